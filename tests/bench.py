"""Measures speed on this machine: tables of ratios within one run, as absolute times differ between machines and days.

    python tests/bench.py --out=bench.json                   # everything
    python tests/bench.py --quick --tables=train             # a smaller form of one table
    python tests/bench.py config/video.py --device=cuda      # another network, on a GPU
"""
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from regimes import OneCopy, OneCopyOfLast

import train
from config import UserError, read_file, run
from data import Batches, open_source, replacing
from model import (
    Cache,
    CausalConv,
    Denoiser,
    ModelConfig,
    Sequence,
    attend_flex,
    attend_frame_by_frame,
    block_mask,
    fold,
    sees,
)
from sample import Rollout, compiled, compute_dtype, noise_levels, pick_device

# -- what to measure
tables = ("train", "conv", "attention", "data", "sample", "memory")     # any of these
quick = False                   # fewer rows and repetitions
out = ""                        # file for the figures, JSON; empty: none
device = "auto"                 # auto, cpu, cuda, ..
threads = 0                     # CPU threads; 0: as many as PyTorch likes
repeat_times = 8                # runs of each form, in turn; the best counts, as other programs only ever add time
supervised_frames = 64          # frames per training step and noised copy
far = 1000                      # frames read by the longest rollout whose evaluations are timed
seed = 0                        # of weights and frames

TABLES, DEFAULTS, CPU = tables, dict(vars(train)), torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------
# Counting and timing.

def count_flops(function):
    """Operations of `function()`, a multiply-add counting as two, from the shapes of its matrix products,
    convolutions and attentions. Nothing is computed, so any size can be counted. Its tensors have to be of a CPU:
    there no masked pair is computed."""
    ops = torch.ops.aten
    mapping = {ops._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
               ops._scaled_dot_product_flash_attention_for_cpu_backward:
                   lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


def best_times(functions, device, repeats, short=False):
    """{name: best ms}, the functions {name: f} run in turn, so that all see the same machine. Short ones are called
    twice and timed the second time: else what ran before would say whose weights are in the processor's caches."""
    def run(function):
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    best = dict.fromkeys(functions, float("inf"))
    for i in range(repeats + 1):                            # the first is a warm-up
        for name, function in functions.items():
            if short:
                run(function)
            began = time.perf_counter()
            run(function)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - began) if i else float("inf"))
    return best


def kept_bytes(function):
    """Bytes of the tensors that the forward pass `function()` keeps for its backward pass."""
    storages = {}

    def pack(x):
        storages[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()
    del result
    return sum(storages.values())


def matmul(device):
    """(function, operations) of a matrix product that shows what the machine can do at most."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=compute_dtype(device))
    return lambda: a @ a, 2 * n ** 3


def print_table(title, rows):
    """Rows are dicts; their keys head the columns."""
    print(f"\n{title}")
    cells = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------
# Table 1: a training step, beside the same network as a plain image model on as many supervised frames.

def model_of(cfg, **changes):
    names = set(ModelConfig.__dataclass_fields__) & set(vars(cfg))
    shape = (3 if cfg.dataset == "video" else 1, cfg.frame_size, cfg.frame_size)
    return Denoiser(ModelConfig(**{"frame_shape": shape, **{n: getattr(cfg, n) for n in names}, **changes}))


def image_model(cfg):
    """No past: temporal kernel 1, and attention within each frame where there was attention over the past."""
    resolutions = (*cfg.video_attn_resolutions, *cfg.frame_attn_resolutions)
    return model_of(cfg, temporal_kernel=1, video_attn_resolutions=(), frame_attn_resolutions=resolutions)


def image_loss(model, images, noise, cfg):
    """The loss of independent noised images n c h w: no clean copy."""
    z, eps = noise
    sigma = (cfg.P_mean + cfg.P_std * z).exp()[:, None, None]
    x = images[:, None, None]
    noised = x + sigma[..., None, None, None] * eps[:, None, None]
    denoised = model.denoise(noised, sigma, None, OneCopy(1, 1))
    weight = (sigma ** 2 + cfg.sigma_data ** 2) / (sigma * cfg.sigma_data) ** 2
    u = model.log_variance(sigma)
    return (weight / u.exp() * (denoised - x).square().mean(dim=(-3, -2, -1)) + u).mean()


class Step:
    """An optimizer step, all of it but for the data: noise, loss, gradients, optimizer, averages."""

    def __init__(self, model, frames, loss, cfg, device):
        self.model, self.cfg = model.to(device), cfg
        self.model.dtype = compute_dtype(device)
        self.network = train.compiled(self.model) if cfg.compile else self.model
        self.optimizer = train.make_optimizer(model, cfg)
        self.ema, self.frames, self.compute_loss = train.PowerEMA(model, cfg.ema_widths), frames.to(device), loss

    def loss(self):
        return self.compute_loss(self.network, self.frames)

    def loss_and_gradients(self):
        self.optimizer.zero_grad()
        self.loss().backward()

    def __call__(self):
        self.loss_and_gradients()
        train.optimizer_step(self.model, self.optimizer, 1, self.cfg)
        self.ema.update(2)


def video_step(cfg, clips, copies, device):
    def loss(model, x):
        return train.loss_of(model, x, None, train.draw_noise(range(len(x)), copies, x.shape[1:], cfg, x.device), cfg)
    return Step(model_of(cfg), clips, loss, cfg, device)


def image_step(cfg, images, device):
    def loss(model, x):
        noise = torch.randn(len(x), device=x.device), torch.randn_like(x)
        return image_loss(model, x, noise, cfg)
    return Step(image_model(cfg), images, loss, cfg, device)


def uncompiled(cfg):
    """To count with: compiled code that runs under a counter is never compiled again, for other steps either."""
    return SimpleNamespace(**vars(cfg) | {"compile": False})


def train_table(cfg, device):
    product, product_flops = matmul(device)
    shape, rows, plain = model_of(cfg).cfg.frame_shape, [], uncompiled(cfg)
    image_flops = count_flops(image_step(plain, torch.zeros(1, *shape), CPU).loss_and_gradients)
    for copies in (1, 4) if cfg.quick else (1, 2, 4):
        for frames in (8, 16) if cfg.quick else (8, 16, 32, 64):
            batch = max(1, cfg.supervised_frames // frames)
            n, clips = batch * copies * frames, torch.randn(batch, frames, *shape) * cfg.sigma_data
            images = torch.randn(n, *shape) * cfg.sigma_data
            ours, floor = video_step(cfg, clips, copies, device), image_step(cfg, images, device)
            forms = {"step": ours, "ours": ours.loss_and_gradients, "floor": floor.loss_and_gradients}
            ms = best_times(forms | {"product": product}, device, cfg.repeat_times)
            flops = batch * count_flops(video_step(plain, clips[:1], copies, CPU).loss_and_gradients)
            floor_flops, peak = n * image_flops, product_flops / ms["product"]
            rows.append({"R": copies, "T": frames, "step ms": ms["step"], "frames/s": n / ms["step"] * 1e3,
                         "ms": ms["ours"], "GFLOP": flops / 1e9, "GFLOP/s": flops / ms["ours"] / 1e6,
                         "% of matmul": 100 * flops / ms["ours"] / peak,
                         "MB kept": kept_bytes(ours.loss) / 1e6, "image ms": ms["floor"],
                         "image % of matmul": 100 * floor_flops / ms["floor"] / peak,
                         "time/image": ms["ours"] / ms["floor"], "FLOPs/image": flops / floor_flops,
                         "time/FLOPs": ms["ours"] / ms["floor"] * floor_flops / flops})
    print_table("R noised copies of T frames: a training step; its loss and gradients alone, beside those of the same "
                "network on as many single images", rows)
    return rows


# ---------------------------------------------------------------------------------------------------
# Table 2: the causal convolution and other ways to compute the same or more, forward and backward.

def conv_forms(c, h, kernel, batch, frames, copies, device):
    """{name: function} of one convolution over (batch, 1 + copies, frames) maps of c channels."""
    conv, n = CausalConv(c, c, kernel).to(device), batch * (1 + copies) * frames
    like = {"device": device, "dtype": compute_dtype(device)}
    seq, scale = Sequence(1 + copies, frames), torch.ones(n, c, **like)
    first = torch.randn(n, c, h, h, **like, requires_grad=True)
    x = first.detach().to(memory_format=torch.channels_last).requires_grad_()

    def shared(x=x):
        return conv(x, scale, seq)

    def stacked():
        """Past frames as channels of one 2D convolution, for every copy."""
        y = seq.unfold(x)
        past = [F.pad(y[:, :1, :-j], (0, 0, 0, 0, 0, 0, j, 0)).expand_as(y) for j in range(1, kernel)]
        return F.conv2d(fold(torch.cat([y, *past], dim=-1)), conv.weight.to(x.dtype).flatten(1, 2), padding=1)

    def plain():
        """A 3D convolution over every copy by itself."""
        y = F.pad(rearrange(first, "(b t) c h w -> b c t h w", t=frames), (0, 0, 0, 0, kernel - 1, 0))
        return F.conv3d(y, conv.weight.to(x.dtype).transpose(1, 2), padding=(0, 1, 1))

    forms = {"shared past": shared, "stacked 2D": stacked, "3D": plain,
             "shared, channels first": lambda: shared(first)}
    return {name: lambda f=f: f().sum().backward() for name, f in forms.items()}


def conv_table(cfg, device):
    rows = []
    for c, h in ((32, 8), (64, 4)) if cfg.quick else ((32, 8), (64, 4), (64, 16)):
        for copies in (1, 4):
            ms = best_times(conv_forms(c, h, 2, 4, 16, copies, device), device, cfg.repeat_times)
            rows.append({"channels": c, "map": f"{h} x {h}", "R": copies, "shared past ms": ms["shared past"],
                         **{f"{name} / ours": t / ms["shared past"] for name, t in list(ms.items())[1:]}})
    print_table("Causal convolution, kernel 2, 4 clips of 16 frames, forward and backward", rows)
    return rows


# ---------------------------------------------------------------------------------------------------
# Table 3: attention, against dense masked attention and against the visible pairs at the matmul peak.

def visible_pairs(copies, frames, window):
    """(frames x frames) bool: what `sees` lets the queries (s t) see."""
    s, t = torch.meshgrid(torch.arange(copies), torch.arange(frames), indexing="ij")
    s, t = s.flatten(), t.flatten()
    return sees(s[:, None], t[:, None], s[None], t[None], window)


def attention_row(frames, positions, window, cfg, device, product, product_flops):
    copies, heads, d, batch = 2, 2, 32, 2
    dtype = compute_dtype(device)
    q, k, v = (torch.randn(batch, heads, copies, frames, positions, d, device=device, dtype=dtype, requires_grad=True)
               for _ in range(3))
    visible = visible_pairs(copies, frames, window)
    mask = visible.repeat_interleave(positions, 0).repeat_interleave(positions, 1).to(device)
    blocks = block_mask(copies, frames, positions, window, device)

    def dense():
        F.scaled_dot_product_attention(*(x.flatten(2, 4) for x in (q, k, v)), attn_mask=mask).sum().backward()

    def ours():
        out = attend_flex(q, k, v, blocks) if q.is_cuda else attend_frame_by_frame(q, k, v, window)
        out.sum().backward()
    ms = best_times({"ours": ours, "dense": dense, "product": product}, device, cfg.repeat_times)
    pairs = visible.sum().item() * positions ** 2 * batch * heads
    at_peak = pairs * 14 * d / product_flops * ms["product"]                # 2 products forward, 5 backward
    return {"T": frames, "p": positions, "window": window, "ours ms": ms["ours"],
            "dense / ours": ms["dense"] / ms["ours"],
            "ours / pairs at peak": ms["ours"] / at_peak, "hidden pairs %": 100 * (1 - visible.float().mean().item()),
            "hidden blocks %": blocks.sparsity()}


def attention_table(cfg, device):
    product, flops = matmul(device)
    sizes = ((12, 16, 8), (16, 64, 16), (32, 64, 32)) if cfg.quick else \
        ((12, 16, 8), (16, 64, 8), (8, 64, 8), (16, 64, 16), (32, 64, 32), (64, 64, 64))
    rows = [attention_row(t, p, window, cfg, device, product, flops) for t, p, window in sizes]
    print_table("Video attention, clean and noised copy of 2 clips, 2 heads of 32, forward and backward", rows)
    return rows


# ---------------------------------------------------------------------------------------------------
# Table 4: data.

def data_table(cfg, device):
    rows, digits_in = [], DEFAULTS["data_dir"] if cfg.dataset == "video" else cfg.data_dir
    for dataset, file in {"digits": "mnist", "world": "world", cfg.dataset: None}.items():
        own = {"dataset": dataset, "data_dir": digits_in} | read_file(str(ROOT / f"config/{file}.py")) if file else {}
        rows += data_rows(SimpleNamespace(**vars(cfg) | own), device)
    print_table(f"Data, batches of {cfg.batch_size} clips, loaded by threads", rows)
    return rows


def data_rows(cfg, device):
    source = open_source(cfg, "train")
    shape = (cfg.batch_size, source.frames, *source.shape)
    step = video_step(cfg, torch.zeros(cfg.batch_size, *shape[1:]), cfg.noised_copies, device)
    step()                                                  # the first may compile for longer than all others take
    with Batches(source, cfg.batch_size, device) as batches:
        began = time.perf_counter()
        for _ in range(count := 20 if cfg.quick else 100):
            next(batches)
        alone = (time.perf_counter() - began) / count
        waited = trained = 0.0
        for _ in range(10):
            began = time.perf_counter()
            next(batches)
            ready = time.perf_counter()
            step()
            waited, trained = waited + ready - began, trained + time.perf_counter() - ready
    return [{"source": cfg.dataset, "batches/s": 1 / alone,
             "share of a step spent waiting %": 100 * waited / (waited + trained)}]


# ---------------------------------------------------------------------------------------------------
# Table 5: sampling.

def read_frames(model, n, device):
    """A cache that holds n frames, read one by one as a rollout does."""
    cache = Cache(device)
    for _ in range(n):
        model.read(torch.randn(1, 1, *model.cfg.frame_shape, device=device), torch.zeros(1, 1, device=device), cache)
    return cache


def sample_table(cfg, device):
    models = [make(cfg).eval().requires_grad_(False).to(device) for make in (model_of, image_model)]
    with torch.no_grad() if cfg.compile else torch.inference_mode():        # as sample.py does
        return sample_rows(cfg, device, *models)


def sample_rows(cfg, device, model, picture):
    model.dtype = picture.dtype = compute_dtype(device)
    window = cfg.window
    x, sigma = torch.randn(1, 1, *model.cfg.frame_shape, device=device), torch.ones(1, 1, device=device)
    one = x[:, None], sigma[:, None], None
    picture.denoise(*one, OneCopy(1, 1))                    # freezes its weights, as a CUDA graph must not
    if cfg.compile:
        model.step, model.read = compiled(model.step), compiled(model.read)
        picture.denoise = torch.compile(picture.denoise, mode="reduce-overhead", dynamic=False)
    positions = (1, window, 4 * window, 16 * window, cfg.far)
    caches = {n: read_frames(model, n, device) for n in positions}
    forms = {n: lambda cache=cache: model.step(x, sigma, cache) for n, cache in caches.items()}
    clips = {n: torch.randn(1, 1, n + 1, *model.cfg.frame_shape, device=device) for n in positions[:3]}
    forms |= {f"all {n}": lambda n=n, clip=clip: model.denoise(clip, torch.ones_like(clip[:, :, :, 0, 0, 0]), None,
                                                               OneCopyOfLast(1, n + 1)) for n, clip in clips.items()}
    forms["image"] = lambda: picture.denoise(*one, OneCopy(1, 1))
    product, product_flops = matmul(device)
    ms = best_times(forms | {"product": product}, device, 5 * cfg.repeat_times, short=True)
    cpu_model = model_of(cfg).eval()
    cache = read_frames(cpu_model, window, "cpu")
    at_peak = count_flops(lambda: cpu_model.step(x.cpu(), sigma.cpu(), cache)) * ms["product"] / product_flops
    rows = [{"frames read": n, "ms": ms[n], "ms without caches": ms.get(f"all {n}", float("nan")),
             "/ image": ms[n] / ms["image"], "/ its FLOPs at peak": ms[n] / at_peak,
             "cache MB": sum(t.nbytes for t in caches[n].tensors.values()) / 1e6} for n in positions]
    print_table(f"One cached evaluation of one frame (the same network on one image: {ms['image']:.3g} ms)", rows)
    fps = []
    for solver, steps in (("euler", 1), ("euler", 2), ("euler", 4), ("euler", 6), ("euler", 18), ("heun", 4)):
        rollout = Rollout(model, x[:, :0], noise_levels(steps, 0.1, 10.0, 7), solver=solver)
        for _ in range(window):
            next(rollout)
        ms = best_times({"frame": lambda r=rollout: next(r)}, device, cfg.repeat_times)["frame"]
        fps.append({"solver": solver, "steps": steps, "ms per frame": ms, "frames/s": 1e3 / ms})
    print_table("Rollout of one clip", fps)
    return rows + fps


# ---------------------------------------------------------------------------------------------------
# Table 6: counted from shapes, for a GPU in bfloat16: the memory of a step, and what processes exchange.

def memory_table(cfg, device):
    """Per parameter 4 bytes each of weight, gradient, moments (muon's one, adam's two) and averages, 2 of the scaled
    weight; what else a forward pass keeps, per clip, counted in float32 on a CPU, which has to hold two clips (of one
    alone, views are kept here and there, not copies), and halved. A tenth of a card stays free."""
    two = torch.zeros(2, cfg.frames, *model_of(cfg).cfg.frame_shape)
    of_two, step = (video_step(uncompiled(cfg), clips, cfg.noised_copies, CPU) for clips in (two, two[:1]))
    count = sum(p.numel() for p in step.model.parameters())
    state = 4 * count * (2 + {"muon": 1, "adam": 2}[cfg.optimizer] + len(cfg.ema_widths))
    once = 2 * count
    with FakeTensorMode(allow_non_fake_inputs=True):        # nothing is computed
        kept = (kept_bytes(of_two.loss) / 2 - once) / 2
    rows = [{"T": cfg.frames, "R": cfg.noised_copies, "million parameters": count / 1e6, "state MB": state / 1e6,
             "MB once": once / 1e6, "MB per clip": kept / 1e6,
             "GFLOP per clip": count_flops(step.loss_and_gradients) / 1e9,
             **{f"clips in {size} GB": int((0.9e9 * size - state - once) / kept) for size in (12, 24, 80)},
             "MB exchanged per step": 8 * count / 1e6}]                     # each gradient sent and received once
    print_table("Counted: memory of a training step in bfloat16, and the exchange of gradients between processes", rows)
    return rows


def main(cfg):
    if unknown := set(cfg.tables) - set(TABLES):
        raise UserError(f"--tables={min(unknown)}: choose from {', '.join(TABLES)}")
    cfg = SimpleNamespace(**vars(cfg) | {"repeat_times": 3 if cfg.quick else cfg.repeat_times})
    device = pick_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    print(f"torch {torch.__version__} on {device}, {torch.get_num_threads()} CPU threads, {compute_dtype(device)}")
    results = {name: globals()[f"{name}_table"](cfg, device) for name in cfg.tables}
    if cfg.out:
        with replacing(cfg.out) as temporary:
            temporary.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    run(main, DEFAULTS | globals())
