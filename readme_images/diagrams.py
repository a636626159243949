"""Draw the README's diagrams, mask.png and regimes.png, beside this file.

    python readme_images/diagrams.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

try:
    import matplotlib
except ImportError:
    sys.exit("error: the diagrams need matplotlib: pip install matplotlib")

matplotlib.use("Agg")  # files only, no display
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from model import sees

BLUE, PALE_BLUE, ORANGE, INK = "#4a7ebb", "#d3e2f4", "#f2a65a", "#222222"
DPI = 170

plt.rcParams.update({
    "font.family": "sans-serif",
    "mathtext.fontset": "cm",
    "text.color": INK,
    "hatch.linewidth": 0.8,
})


def canvas(width, height, xlim, ylim):
    """An empty drawing `width` x `height` inches; y grows downwards when ylim does."""
    figure = plt.figure(figsize=(width, height), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1), xlim=xlim, ylim=ylim)
    axes.axis("off")
    return axes


def box(axes, x, y, width, height, fill, hatch=None, hatch_color="white", **outline):
    """A rectangle whose hatching and outline have colours of their own."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=hatch_color, hatch=hatch, lw=0))
    axes.add_patch(Rectangle((x, y), width, height, fill=False, **{"edgecolor": INK, "lw": 0.8, **outline}))


def frame_name(t, noised):
    return rf"$\tilde{{x}}_{t}$" if noised else rf"$x_{t}$"


def save(axes, name):
    axes.figure.savefig(HERE / name, facecolor="white")
    plt.close(axes.figure)
    print(HERE / name)


# ---------------------------------------------------------------------------------------------
# mask.png: which frame sees which in a training pass. The cells are what the model computes.

FRAMES, WINDOW = 6, 4
CELLS = {  # (query is noised, key is noised): the look of a filled cell
    (False, False): {"fill": BLUE},
    (True, False): {"fill": PALE_BLUE, "hatch": "////", "hatch_color": BLUE},
    (True, True): {"fill": ORANGE, "hatch": "....", "hatch_color": INK},
}
LEGEND = [  # (query is noised, key is noised), row, meaning
    ((False, False), 2.5, "a clean frame sees itself\nand the clean frames before it"),
    ((True, False), 7.0, "a noised frame sees the\nclean frames before it ..."),
    ((True, True), 10.0, "... and itself, but no\nother noised frame"),
]


def draw_cells(axes):
    order = [(s, t) for s in (0, 1) for t in range(1, FRAMES + 1)]  # copy 0 is clean, copy 1 noised
    for row, (s_q, t_q) in enumerate(order):
        for column, (s_k, t_k) in enumerate(order):
            seen = sees(s_q, t_q, s_k, t_k, WINDOW)
            look = CELLS[bool(s_q), bool(s_k)] if seen else {"fill": "white"}
            box(axes, column, row, 1, 1, edgecolor="#bbbbbb", lw=0.6, **look)
        axes.text(-0.3, row + 0.5, frame_name(t_q, s_q), ha="right", va="center", size=12)
        axes.text(row + 0.5, -0.25, frame_name(t_q, s_q), ha="center", va="bottom", size=12)


def draw_brackets(axes):
    """'clean' and 'noised' along both axes, and lines between the two copies."""
    for start, name in ((0, "clean"), (FRAMES, "noised")):
        low, high, middle = start + 0.15, start + FRAMES - 0.15, start + FRAMES / 2
        axes.plot([low, low, high, high], [-1.05, -1.25, -1.25, -1.05], color=INK, lw=1)
        axes.text(middle, -1.4, name, ha="center", va="bottom", size=11)
        axes.plot([-1.15, -1.35, -1.35, -1.15], [low, low, high, high], color=INK, lw=1)
        axes.text(-1.5, middle, name, ha="right", va="center", size=11, rotation=90)
    axes.text(FRAMES, -2.35, "keys", ha="center", va="bottom", size=11, weight="bold")
    axes.text(-2.35, FRAMES, "queries", ha="right", va="center", size=11, weight="bold", rotation=90)
    for line in (0, FRAMES, 2 * FRAMES):
        axes.plot([0, 2 * FRAMES], [line, line], color=INK, lw=1.2)
        axes.plot([line, line], [0, 2 * FRAMES], color=INK, lw=1.2)


def draw_mask():
    axes = canvas(7.6, 5.6, xlim=(-3.4, 20.9), ylim=(14.3, -3.6))
    draw_cells(axes)
    draw_brackets(axes)
    for kind, y, meaning in LEGEND:
        box(axes, 12.8, y, 1, 1, **CELLS[kind])
        axes.text(14.1, y + 0.5, meaning, va="center", size=9.5)
    caption = (
        f"One training pass over {FRAMES} frames with a window of {WINDOW}: every frame sees\n"
        f"itself and the last {WINDOW - 1} clean frames before it. White: not seen."
    )
    axes.text(0, 12.4, caption, va="top", size=10, linespacing=1.4)
    save(axes, "mask.png")


# ---------------------------------------------------------------------------------------------
# regimes.png: five ways to train on a clip, what each supervises and what it costs.

T = 5
SIDE = 0.8  # of a frame's box; boxes are 1 apart
PANEL = 6.2  # from one panel to the next
TOP, CENTER, BOTTOM = 2.3, 0.8, 0.0  # rows of boxes


def frame(axes, x, y, name, noised=False, supervised=False):
    """One frame of a clip, (x, y) being its box's lower left corner."""
    look = {"fill": PALE_BLUE, "hatch": "....", "hatch_color": "#a9c0dc"} if noised else {"fill": "white"}
    box(axes, x, y, SIDE, SIDE, **look, lw=2.2 if supervised else 0.9)
    axes.text(x + SIDE / 2, y + SIDE / 2, name, ha="center", va="center", size=10.5)


def arrow(axes, start, end, bend=0.0, style="-|>"):
    look = {"arrowstyle": f"{style},head_width=0.13,head_length=0.26", "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops={**look, "color": BLUE, "lw": 0.9, "shrinkA": 1, "shrinkB": 2.5})


def clip(axes, x, y, noised, supervised=()):
    """A row of frames 1 to T, of which those in `noised` and `supervised` are."""
    for t in range(1, T + 1):
        is_noised = t in noised
        frame(axes, x + t - 1, y, frame_name(t, is_noised), is_noised, t in supervised)


def middle(x, t):
    return x + t - 1 + SIDE / 2


def arc(axes, x, y, past, t, bend, style="-|>"):
    arrow(axes, (middle(x, past), y), (middle(x, t), y), bend, style)


ALL = range(1, T + 1)
PAIRS = [(past, t) for t in ALL for past in range(1, t)]


def draw_whole_clip(axes, x):
    clip(axes, x, CENTER, noised=ALL, supervised=ALL)
    for past, t in PAIRS:
        arc(axes, x, CENTER + SIDE, past, t, bend=-0.45, style="<|-|>")


def draw_independent(axes, x):
    clip(axes, x, CENTER, noised=ALL, supervised=ALL)
    for past, t in PAIRS:
        arc(axes, x, CENTER + SIDE, past, t, bend=-0.45)


def draw_last_frame(axes, x):
    clip(axes, x, CENTER, noised=[T], supervised=[T])
    for past in range(1, T):
        arc(axes, x, CENTER + SIDE, past, T, bend=-0.45)


def draw_two_rows(axes, x, reach):
    """Clean frames, and above them noised ones that see the last `reach` of them."""
    clip(axes, x, BOTTOM, noised=())
    clip(axes, x, TOP, noised=ALL, supervised=ALL)
    for past, t in PAIRS:
        if t - past <= reach:
            arrow(axes, (middle(x, past), BOTTOM + SIDE), (middle(x, t), TOP))


def draw_stacking(axes, x):
    draw_two_rows(axes, x, reach=2)


def draw_ours(axes, x):
    draw_two_rows(axes, x, reach=T)
    for past, t in PAIRS:
        arc(axes, x, BOTTOM, past, t, bend=0.3)


REGIMES = [  # title, what draws it, supervised frames of those that go through the network, what comes with it
    ("whole-clip diffusion", draw_whole_clip, "$T$ of $T$", "but one fixed length,\nnot step by step"),
    ("independent noise", draw_independent, "$T$ of $T$", "but the past seen in training\nis noised to any level"),
    ("frame stacking", draw_stacking, "$T$ of $T$", "the last $k$ frames are input\nchannels, all others forgotten"),
    ("last frame only", draw_last_frame, "$1$ of $T$", "a full past, but little\nsignal per pass"),
    ("ours", draw_ours, "$T$ of $2T$", "with one noised copy; the clean\none skips the decoder"),
]


def draw_key(axes, y):
    """What boxes and arrows mean, in one line under the panels."""
    for x, meaning in ((6.6, "clean"), (10.4, "noised"), (14.6, "supervised")):
        frame(axes, x, y, "", **({} if meaning == "clean" else {meaning: True}))
        axes.text(x + 1.1, y + SIDE / 2, meaning, va="center", size=9)
    arrow(axes, (20.1, y + SIDE / 2), (21.2, y + SIDE / 2))
    axes.text(21.5, y + SIDE / 2, "is seen by", va="center", size=9)


def draw_regimes():
    axes = canvas(11.1, 3.75, xlim=(-0.45, 30.05), ylim=(-5.85, 4.25))
    for number, (title, draw, ratio, meaning) in enumerate(REGIMES):
        x = number * PANEL
        center = x + (T - 1 + SIDE) / 2
        axes.text(center, 3.8, title, ha="center", va="center", size=10, weight="bold")
        draw(axes, x)
        axes.text(center, -2.35, ratio, ha="center", va="center", size=13)
        axes.text(center, -2.9, meaning, ha="center", va="top", size=8.5, linespacing=1.3)
    question = "supervised frames of those that go through the network"
    axes.text(14.8, -1.45, question, ha="center", va="center", size=9, style="italic")
    for start, end in ((0, 9.4), (20.2, 29.6)):
        axes.plot([start, end], [-1.45, -1.45], color="#bbbbbb", lw=0.8)
    draw_key(axes, -5.5)
    save(axes, "regimes.png")


if __name__ == "__main__":
    draw_mask()
    draw_regimes()
