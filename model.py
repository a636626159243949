"""The network: EDM2's magnitude-preserving UNet, over the frames of a clip.

A training pass holds every clip 1 + R times: copy s = 0 is clean, copies s = 1..R are noised. Activations are
`(b s t) c h w`: batch, copy, frame folded into one axis; in memory the channels come last, which convolutions like.
Every query frame (s, t), clean or noised, sees itself and the clean frames before it; this one rule is all there is to
the time axis, in the convolutions as in the attention. So a noised frame is denoised given its clean past, and all
frames of the clip are trained in one pass. Time is mixed in the UNet's encoder and middle and on its skips; the decoder
works on the frames to be denoised, each by itself.

    EDM   Karras et al. 2022, arXiv 2206.00364      EDM2  Karras et al. 2023, arXiv 2312.02696
"""
import functools
import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from config import at_least, require

torch.backends.cuda.enable_cudnn_sdp(False)                 # it plans anew for every shape, and has had wrong results

# ---------------------------------------------------------------------------------------------------
# Magnitude-preserving operations: unit variance in, unit variance out (EDM2, section 2 and appendix B).

def unit_rms(x, dims, gain=1.0):
    """x scaled to root mean square `gain` over `dims`, measured in float32."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)      # keeps no float32 copy of x
    mean_square = norm.square() * (norm.numel() / x.numel())
    return x * (gain * (mean_square + 1e-8).rsqrt()).to(x.dtype)


SILU_GAIN = 1 / 0.596                                       # of mp_silu (EDM2 Eq. 81)


def mp_silu(x):
    return F.silu(x) * SILU_GAIN


def blend(t):
    """The factors of a and b in mp_sum(a, b, t) (EDM2 Eq. 88). Where b is the output of a convolution, its factor is
    folded into the weights, as `SILU_GAIN` is: that saves a pass over the activations, forward and backward."""
    return (1 - t) / math.hypot(1 - t, t), t / math.hypot(1 - t, t)


def mp_sum(a, b, t):
    keep, add = blend(t)
    return a * keep + b * add


def mp_cat(a, b, t=0.5):
    """Channels of a, then of b, scaled so that b contributes with weight t whatever its size (EDM2 Eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = (n_a + n_b) / ((1 - t) ** 2 + t ** 2)
    parts = (a, (1 - t) * math.sqrt(scale / n_a)), (b, t * math.sqrt(scale / n_b))       # factors of 1 for equal parts
    return torch.cat([x if factor == 1 else x * factor for x, factor in parts], dim=1)


class MPFourier(nn.Module):
    """Random Fourier features of `inputs` numbers (EDM2 Eq. 75): (..., inputs) -> (..., features)."""

    def __init__(self, features, inputs=1):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(inputs, features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))

    def forward(self, x):
        return math.sqrt(2) * torch.cos(x.float() @ self.frequencies + self.phases)


class MPWeight(nn.Module):
    """A weight whose rows (one per output) stay on the sphere of RMS 1, and act scaled by 1 / sqrt(fan in).

    EDM2 normalises weights in every forward pass, so that the gradient has no part along the weight, and in place
    before every step, so that the weight's growth does not slow learning down (Eq. 47 and 66). Both are done here once
    per optimizer step: `Denoiser.project_gradients` before it, `Denoiser.normalize_weights` after it."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(unit_rms(torch.randn(shape), tuple(range(1, len(shape)))))
        self.fan_in = math.prod(shape[1:])
        self.frozen = None, None, None                      # (key, state, result) that `scaled` keeps

    def scaled(self, dtype, gain=1.0):
        """The weight as it is used. If it needs no gradient, it is computed once and kept until the weight is written
        to (writes through `.data` go unnoticed). Compiled code uses what the uncompiled pass before it computed."""
        if self.weight.requires_grad:
            return self.compute_scaled(dtype, gain)
        key = dtype, gain, self.weight.device
        if torch.compiler.is_compiling():
            return self.frozen[2] if self.frozen[0] == key else self.compute_scaled(dtype, gain)
        state = self.weight._version, self.weight.data_ptr()            # the second for a copied model
        if self.frozen[:2] != (key, state):
            self.frozen = key, state, self.compute_scaled(dtype, gain)
        return self.frozen[2]

    def compute_scaled(self, dtype, gain):
        rows = self.weight.flatten(1) * (gain / math.sqrt(self.fan_in))         # flat, or gradients have other strides
        layout = torch.channels_last if self.weight.ndim == 4 else torch.preserve_format         # as activations are
        return rows.view_as(self.weight).to(dtype, memory_format=layout)


class MPLinear(MPWeight):
    """(..., c_in) -> (..., c_out), no bias."""

    def forward(self, x):
        return F.linear(x, self.scaled(x.dtype))


def border_gain(h, w):
    """What a 3 x 3 convolution with zero padding loses in RMS over an h x w map, to be given back: a third of the
    taps is missing along each edge, which on a 4 x 4 map would cost 17 percent per layer."""
    return math.sqrt(9 * h * w / ((3 * h - 2) * (3 * w - 2)))


class MPConv(MPWeight):
    """Convolution of every frame by itself, `same` padding, no bias; weight c_out c_in k k, k = 1 or 3."""

    def forward(self, x, gain=1.0):
        k = self.weight.shape[-1]
        weight = self.scaled(x.dtype, gain * (border_gain(*x.shape[2:]) if k == 3 else 1))
        return F.conv2d(x, weight, padding=k // 2)


# ---------------------------------------------------------------------------------------------------
# The time axis: how the frames of a pass are laid out, and what step-by-step inference remembers.

def sees(s_q, t_q, s_k, t_k, window):
    """Whether query frame (s_q, t_q), ints or tensors, sees key frame (s_k, t_k): itself, and clean frames (s = 0)
    before it; `window` counts frames, the present one included."""
    itself = (s_q == s_k) & (t_q == t_k)
    return itself | ((s_k == 0) & (t_k < t_q) & (t_q - t_k < window))


class Cache:
    """The past of a rollout: each attention's keys and values of the last `window` frames, as a ring, and what
    the past contributes to each causal convolution's next frames. Layers allocate their part at first use. Everything
    in it is a tensor that keeps shape and place, the number of frames too: an evaluation runs the same operations on
    the same memory at every frame, so it can be compiled, or captured as a CUDA graph, once."""

    def __init__(self, device="cpu"):
        self.clock = torch.zeros((), dtype=torch.long, device=device)    # frames read so far = present frame's index
        self.tensors = {}                                   # number of a layer -> tensor, rewritten in place ever after
        self.tables = {}                                    # (function, *settings) -> its value at `clock`, likewise

    @property
    def position(self):
        return self.clock.item()

    def buffer(self, layer, shape, like):
        if layer.number not in self.tensors:
            self.tensors[layer.number] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        found = tuple(self.tensors[layer.number].shape)
        require(found == tuple(shape), f"the cache is of one batch: it holds {found}, not {tuple(shape)}", ValueError)
        return self.tensors[layer.number]

    def advance(self, frames=1):
        self.clock += frames
        for (function, *settings), table in self.tables.items():
            table.copy_(function(self.clock[None], *settings))


def fold(x):
    """b s t .. c -> (b s t) c .."""
    return x.flatten(0, 2).movedim(-1, 1)


@dataclass
class Sequence:
    """How a pass lays out its frames, `(b s t)`. Training, without a cache: `copies` of `frames` frames, copy 0 clean.
    Sampling, with a cache: one copy of one frame, the present one; `commit`: it is clean and enters the cache. `last`:
    the layer is the last that mixes time, and drops the clean frames, which nothing after it reads. `masks`, on a GPU:
    FlexAttention's, keyed by the number of positions in a frame."""
    copies: int = 1
    frames: int = 1
    cache: Cache = None
    commit: bool = False
    last: bool = False
    masks: dict = None
    tables: dict = field(default_factory=dict)              # what `position_table` has returned, without a cache

    def position_table(self, function, device, *settings):
        """function(index of each frame in its clip or rollout, *settings), computed once for all layers of a pass, and
        with a cache once for all passes on a frame."""
        tables, key = self.tables if self.cache is None else self.cache.tables, (function, *settings)
        if key not in tables:
            positions = torch.arange(self.frames, device=device) if self.cache is None else self.cache.clock[None]
            tables[key] = function(positions, *settings)
        return tables[key]

    def unfold(self, x):
        """(b s t) c .. -> b s t .. c"""
        return x.movedim(1, -1).unflatten(0, (-1, self.copies, self.frames))

    def split(self, x):
        """b s t .. -> its clean copy b 1 t .. (none when one noised frame is sampled), and b r t .., the frames to be
        denoised. For both at once: the gradients of two slices would each be of x's whole size."""
        clean = int(self.cache is None or self.commit)
        return x.split([clean, x.shape[1] - clean], dim=1)

    def noised(self, x):
        return self.split(x)[1]

    def to_noised(self, x):
        """b t .., the same for every copy -> b 1 t .., of the frames that `noised` returns (in regimes.py fewer)."""
        return x[:, None]

    def noised_only(self, x):
        """(b s t) c .. -> (b r t) c .."""
        return fold(self.noised(self.unfold(x)))

    def passed_on(self, x):
        """The part of x (b s t) .. that the next layer reads: after the `last` one no clean frames."""
        return self.noised_only(x) if self.last else x


def past_gain(positions, kernel, dtype):
    """g_t of the frames at `positions` t: t 1. A missing past must not shrink the first frames."""
    return (kernel / (positions + 1).clamp(max=kernel)).sqrt()[:, None].to(dtype)


class CausalConv(MPWeight):
    """Convolution over the present and the k - 1 clean frames before it; weight c_out k c_in 3 3.

        y[s,t] = g_t (W_0 * x[s,t] + sum_j W_j * x[0,t-j])        g_t = sqrt(k / taps that lie in the clip)

    The sum is the same for every copy, so it is computed once, from the clean frames. A frame's contributions to all
    later frames come out of one convolution, so the cache holds finished sums, and a frame costs what an image does."""

    def __init__(self, c_in, c_out, kernel, size=3):
        super().__init__(c_out, kernel, c_in, size, size)
        self.kernel = kernel

    def forward(self, x, scale, seq, gain=1.0):
        """x: (b s t) c_in h w; scale: (b s t) c_out, times the output -> (b s t) c_out h w, or (b r t) .. if `last`."""
        weight = self.scaled(x.dtype, gain * border_gain(*x.shape[2:]))
        y = F.conv2d(seq.passed_on(x), weight[0], padding=1)
        if self.kernel > 1:
            past = self.past(seq.unfold(x), weight[1:], seq)
            past = seq.to_noised(past) if seq.last else past[:, None]                    # the same for every copy
            y = y.movedim(1, -1).unflatten(0, (len(past), -1, past.shape[2]))            # b s t h w c
            y = fold(y + past)
            scale = (scale.unflatten(0, (-1, seq.frames)) * self.table(x, seq)).flatten(0, 1)
        return y * seq.passed_on(scale)[..., None, None]

    def table(self, x, seq):
        return seq.position_table(past_gain, x.device, self.kernel, x.dtype)

    def compute_scaled(self, dtype, gain):
        weight = super().compute_scaled(dtype, gain).permute(1, 0, 3, 4, 2)
        return weight.contiguous().movedim(-1, 2)           # k c_out c_in 3 3, in memory the channels last

    def past(self, x, weight, seq):
        """What the clean frames before each frame add to it: x b s t h w c_in -> b t h w c_out."""
        if seq.cache is None:
            parts = self.contributions(x.flatten(1, 2)[:, :seq.frames - 1], weight)      # of clean frames, but the last
            parts = zip(range(1, seq.frames + 1), parts)    # taps that reach beyond the clip are left out
            return sum(F.pad(part, (0, 0, 0, 0, 0, 0, j, 1 - j)) for j, part in parts)   # moved j frames later, cut
        carry = seq.cache.buffer(self, (len(x), len(weight), *x.shape[3:5], weight.shape[1]), x)
        present = carry[:, :1]                              # b j h w c: sums for the present frame and the next ones
        if seq.commit:
            present, later = present.clone(), F.pad(carry[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1))
            carry.copy_(later + self.contributions(x[:, 0], weight)[:, :, 0].transpose(0, 1))
        return present

    def contributions(self, clean, weight):
        """What each of n clean frames adds to the frames j = 1, 2, .. after it: b n h w c_in -> j b n h w c_out."""
        frames = clean.flatten(0, 1).movedim(-1, 1)
        parts = F.conv2d(frames, weight.flatten(0, 1), padding=weight.shape[-1] // 2)
        return rearrange(parts, "(b t) (j o) h w -> j b t h w o", b=len(clean), j=len(weight))


def past_skip_gain(positions, kernel, dtype):
    """g_t of a `PastSkip`, t 1 1 1: the fewer past frames there are, the larger the frame's own weight."""
    return (1 - positions.clamp(max=kernel - 1) / (2 * (kernel - 1))).sqrt()[:, None, None, None].to(dtype)


class PastSkip(CausalConv):
    """A skip from encoder to decoder that adds to a frame's features those of the clean frames before it:

        y[s,t] = g_t x[s,t] + sum_j W_j * x[0,t-j] / sqrt(2)        W_j 1 x 1, k > 1; g_t keeps the magnitude

    So the decoder, which has learnt at the coarse levels what moves where, has the past at hand in full detail."""

    def __init__(self, channels, kernel):
        super().__init__(channels, channels, kernel - 1, size=1)
        self.kernel = kernel

    def forward(self, x, seq):
        """x: (b s t) c h w -> (b r t) c h w of the frames to be denoised."""
        x, gain = seq.unfold(x), seq.position_table(past_skip_gain, x.device, self.kernel, x.dtype)
        clean, noised = seq.split(x)
        past = self.past(clean, self.scaled(x.dtype, 0.5 ** 0.5), seq)
        return fold(torch.addcmul(seq.to_noised(past), noised, seq.to_noised(gain[None])))


# ---------------------------------------------------------------------------------------------------
# Video attention: one softmax over all that `sees` allows. q, k, v: b m s t p d (m heads, p = h w places, d dim).

ROTARY_PERIOD = 1024                                        # frames, after which positions repeat
FRAMES_AT_ONCE = 16                                         # attended to in one call on a CPU


def rotation(positions, pairs, dtype):
    """cos and sin of the frames at `positions` t: 2 t 1 pairs. All frequencies are whole turns per `ROTARY_PERIOD`
    frames, so that positions count modulo the period, exactly, however long the rollout."""
    fastest = ROTARY_PERIOD / (2 * math.pi)                 # one radian per frame
    turns = (fastest ** (1 - torch.arange(pairs, device=positions.device) / pairs)).round().long()
    angle = (positions[:, None] * turns % ROTARY_PERIOD) * (2 * math.pi / ROTARY_PERIOD)
    return torch.stack([angle.cos(), angle.sin()])[:, :, None].to(dtype)


def rotate(x, cos, sin):
    """Rotary embedding over time: x: .. t p d, by its frames' `rotation`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def with_past(clean, own, past):
    """Keys or values of n frames, `own` b m s n p d, with those of the `past` clean frames before each put in front.
    `clean`: the n + past - 1 clean frames they come from, b m p d each -> (b m s) n ((past + 1) p) d."""
    if past == 0:
        return own.flatten(0, 2)
    s, n = own.shape[2:4]
    windows = [clean[i:i + past] for i in range(n)]         # one before each frame, overlapping
    seen = torch.stack([frame for window in windows for frame in window], dim=2)
    seen = rearrange(seen, "b m (n t) p d -> b m 1 n (t p) d", n=n).expand(-1, -1, s, -1, -1, -1)
    return torch.cat([seen, own], dim=-2).flatten(0, 2)


@torch._disable_dynamo                  # torch.compiler.disable, but for its importing a compiler at once: 1.3 s
def attend_frame_by_frame(q, k, v, window):
    """The CPU path: each frame attends to the keys that it sees and no others, so nothing is masked. Frames with a full
    window see equally many keys, so they are batched, `FRAMES_AT_ONCE` at a time. A loop over frames would take minutes
    to compile, with nothing to gain."""
    early = min(window - 1, q.shape[3])
    sizes = [1] * early + [min(FRAMES_AT_ONCE, q.shape[3] - i) for i in range(early, q.shape[3], FRAMES_AT_ONCE)]
    clean_k, clean_v = k[:, :, 0].unbind(2), v[:, :, 0].unbind(2)                        # t times b m p d
    t, out = 0, []
    for q_t, k_t, v_t in zip(*(x.split(sizes, dim=3) for x in (q, k, v)), strict=True):
        past, n = min(t, window - 1), q_t.shape[3]
        seen = slice(t - past, t + n - 1)
        keys, values = with_past(clean_k[seen], k_t, past), with_past(clean_v[seen], v_t, past)
        out.append(F.scaled_dot_product_attention(q_t.flatten(0, 2), keys, values))
        t += n
    return torch.cat(out, dim=1).view_as(q)


@functools.lru_cache(maxsize=64)
def block_mask(copies, frames, positions, window, device):
    """FlexAttention's mask of `sees` for sequences (s t p): blocks that nobody sees cost nothing."""
    def mask(b, m, q, k):
        return sees(q // (frames * positions), q // positions % frames,
                    k // (frames * positions), k // positions % frames, window)
    length = copies * frames * positions                    # _compile: without the dense length x length mask
    return create_block_mask(mask, None, None, length, length, device=device, _compile=device.type == "cuda")


@functools.cache
def compiled_flex_attention():
    # With more shapes than this, torch falls back to the uncompiled function, which builds the full score matrix.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def attend_flex(q, k, v, mask):
    """The GPU path: block-sparse FlexAttention over the whole sequence, `mask` being its `block_mask`."""
    flex = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    return flex(*(x.flatten(2, 4) for x in (q, k, v)), block_mask=mask).view_as(q)


def ring_mask(position, window, places, dtype):
    """Added to the logits of the ring's keys: -inf in slots that no frame has filled yet. 1 (window p)"""
    unseen = torch.arange(window, device=position.device) > position
    return torch.zeros_like(unseen, dtype=dtype).masked_fill(unseen, -math.inf).repeat_interleave(places)[None]


def attend_cached(q, k, v, ring, slot, mask):
    """The present frame attends to a ring (2 b m window p d) of the last frames' keys and values. Its own go into the
    slot of the frame that leaves the window, at every evaluation and once more when it is read as clean."""
    ring.index_copy_(3, slot, torch.stack([k[:, :, 0], v[:, :, 0]]))
    return F.scaled_dot_product_attention(q[:, :, 0, 0], *ring.flatten(3, 4), attn_mask=mask).view_as(q)


TRUNK, BRANCH = blend(0.3)                                  # factors of trunk and branch in residual sums


class Attention(nn.Module):
    """Cosine attention with residual sum: over a frame's own positions (window 1) or those of its past too. The logits
    of unit vectors lie between -sqrt(d) and sqrt(d), too flat to pick one among hundreds of keys. A learnt factor per
    head, `sharpness`, lets it find a place again that left the picture some frames ago."""

    def __init__(self, channels, head_dim, window):
        super().__init__()
        self.head_dim, self.window = head_dim, window
        self.qkv = MPConv(3 * channels, channels, 1, 1)
        self.out = MPConv(channels, channels, 1, 1)
        self.sharpness = nn.Parameter(torch.ones(channels // head_dim))

    def forward(self, x, seq):
        qkv = rearrange(self.qkv(x).movedim(1, -1), "(b s t) h w (n m d) -> n b m s t (h w) d",
                        n=3, d=self.head_dim, s=seq.copies, t=seq.frames).contiguous()   # as fused kernels want it
        gains = F.pad(self.sharpness[None], (0, 0, 0, 2), value=1).view(3, 1, -1, 1, 1, 1, 1)    # of q; of k and v 1
        y = self.attend(unit_rms(qkv, -1, gains), seq)
        y = rearrange(y, "b m s t (h w) d -> (b s t) h w (m d)", h=x.shape[2]).movedim(-1, 1)
        return self.out(y, BRANCH).add_(x, alpha=TRUNK)

    def table(self, x, seq):
        return seq.position_table(rotation, x.device, self.head_dim // 2, x.dtype)

    def attend(self, qkv, seq):
        if self.window == 1:
            return F.scaled_dot_product_attention(*qkv.flatten(1, 3)).view_as(qkv[0])
        q_and_k, (v,) = qkv.split([2, 1])
        q, k = rotate(q_and_k, *self.table(v, seq))
        if seq.cache is not None:
            b, m, _, _, p, d = q.shape
            ring = seq.cache.buffer(self, (2, b, m, self.window, p, d), k)
            slot = seq.position_table(torch.remainder, v.device, self.window)         # position % window
            return attend_cached(q, k, v, ring, slot, seq.position_table(ring_mask, v.device, self.window, p, v.dtype))
        if seq.masks:
            return attend_flex(q, k, v, seq.masks[q.shape[4]])
        return attend_frame_by_frame(q, k, v, self.window)


# ---------------------------------------------------------------------------------------------------
# The UNet (EDM2 Figure 21, config G). Time is mixed by encoder and middle, in each block's first convolution and
# attention, and on the skips. Nothing else reads the clean frames: the decoder, the larger half, runs without them.

@dataclass
class ModelConfig:
    frame_shape: tuple = (1, 32, 32)            # channels, height, width of a frame
    patch_size: int = 4                         # n x n pixels are folded into channels before the UNet
    channels: int = 32                          # at the finest level
    channel_mults: tuple = (1, 2)               # per level; each level halves the resolution
    blocks_per_level: int = 1
    video_attn_resolutions: tuple = (4,)        # feature map heights with attention, before the decoder over the past
    frame_attn_resolutions: tuple = ()          # ... with attention within the frame
    head_dim: int = 32                          # of attention; a power of two, 16 to 64 for FlexAttention
    window: int = 8                             # frames that attention sees, the present one included
    temporal_kernel: int = 2                    # frames that convolutions before the decoder see, with the present
    action_dim: int = 0                         # discrete: how many; continuous: vector length; 0: none
    dropout: float = 0.0
    recompute: bool = False                     # in the backward pass, what blocks computed: less memory, more time
    sigma_data: float = 0.5                     # standard deviation of the frames the network is given

    def levels(self):
        """Each level's (channels, attention window: 1 within the frame, 0 none). UserError for what cannot work."""
        depth, (_, height, width) = len(self.channel_mults), self.frame_shape
        factor = self.patch_size * 2 ** (depth - 1)
        require(height % factor == width % factor == 0, f"a frame of {height} x {width} pixels must be divisible by "
                                                        f"{factor} (patch_size {self.patch_size}, {depth} levels)")
        heights = [height // self.patch_size >> i for i in range(depth)]
        for wanted in (*self.video_attn_resolutions, *self.frame_attn_resolutions):
            require(wanted in heights, f"attention resolution {wanted}: feature maps are {heights} high")
        at_least(self, 1, "window", "temporal_kernel")
        require(self.window <= ROTARY_PERIOD // 2, f"window={self.window}: at most {ROTARY_PERIOD // 2} frames")
        widths = [self.channels * mult for mult in self.channel_mults]
        windows = [self.window if h in self.video_attn_resolutions else int(h in self.frame_attn_resolutions)
                   for h in heights]
        require(self.head_dim > 0 and self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even, and above 0")
        for c, w in zip(widths, windows):
            require(not w or c % self.head_dim == 0, f"head_dim {self.head_dim} does not divide a level's {c} channels")
        return list(zip(widths, windows))


class Block(nn.Module):
    """Resampling, a residual branch of two convolutions, attention. The first convolution sees `kernel` frames and is
    modulated by the noise embedding. An encoder block normalises its trunk before the branch reads it."""

    def __init__(self, c_in, c_out, c_emb, cfg, kernel=1, window=0, encoder=False, resample=None):
        super().__init__()
        self.encoder, self.resample, self.dropout = encoder, resample, cfg.dropout
        self.skip = MPConv(c_out, c_in, 1, 1) if c_in != c_out else nn.Identity()
        self.conv0 = CausalConv(c_out if encoder else c_in, c_out, kernel)
        self.emb, self.emb_gain = MPLinear(c_out, c_emb), nn.Parameter(torch.zeros(1))
        self.conv1 = MPConv(c_out, c_out, 3, 3)
        self.attention = Attention(c_out, cfg.head_dim, window) if window else None

    def forward(self, x, emb, seq):
        x = self.resample(x) if self.resample else x
        trunk = self.skip(x)
        if self.encoder:
            x = trunk = unit_rms(trunk, 1)                  # pixel norm
        scale = (1 + self.emb(emb) * self.emb_gain).to(x.dtype)
        y = F.dropout(F.silu(self.conv0(F.silu(x), scale, seq, SILU_GAIN)), self.dropout, self.training)
        y = self.conv1(y, SILU_GAIN * BRANCH)
        x = y.add_(seq.passed_on(trunk), alpha=TRUNK)       # an mp_sum, BRANCH being in conv1's weights
        return self.attention(x, seq) if self.attention else x


ALONE = Sequence()                                          # the layout where every frame is by itself


class UNet(nn.Module):
    def __init__(self, c_io, c_emb, cfg):
        super().__init__()
        levels = cfg.levels()
        c, self.recompute = levels[0][0], cfg.recompute
        block = functools.partial(Block, c_emb=c_emb, cfg=cfg)
        kernel = cfg.temporal_kernel
        self.stem = MPConv(c, c_io + 1, 3, 3)               # + 1: a channel of ones stands in for biases
        self.encoder, self.decoder, skip_widths = nn.ModuleList(), nn.ModuleList(), [c]
        for i, (width, window) in enumerate(levels):
            if i > 0:
                self.encoder.append(block(c, c, kernel=kernel, encoder=True, resample=nn.AvgPool2d(2)))
                skip_widths.append(c)
            for _ in range(cfg.blocks_per_level):
                self.encoder.append(block(c, width, kernel=kernel, window=window, encoder=True))
                skip_widths.append(c := width)
        self.skips = nn.ModuleList(PastSkip(width, kernel) for width in skip_widths if kernel > 1)
        self.middle = nn.ModuleList([block(c, c, kernel=kernel, window=window), block(c, c, kernel=kernel)])
        for i, (width, window) in reversed([*enumerate(levels)]):
            for _ in range(cfg.blocks_per_level + 1):
                self.decoder.append(block(c + skip_widths.pop(), width, window=min(window, 1)))
                c = width
            if i > 0:
                self.decoder.append(block(c, c, resample=nn.Upsample(scale_factor=2)))
        self.head = MPConv(c_io, c, 3, 3)
        self.head_gain = nn.Parameter(torch.zeros(1))

    def run(self, block, *inputs):
        """The block's output; with `recompute`, what it computes on the way is forgotten until the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def encode(self, x, emb, seq):
        """x: (b s t) c h w, emb: (b s t) e -> of frames to be denoised the list of skips and the middle, (b r t) .."""
        outputs = [self.stem(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))]
        if self.recompute and seq.cache is None:            # compiled, a checkpointed block may not fill seq.tables
            for layer in (*self.encoder.modules(), *self.middle.modules()):
                if isinstance(layer, (CausalConv, Attention)):
                    layer.table(x, seq)
        for block in self.encoder:
            outputs.append(self.run(block, outputs[-1], emb, seq))
        first, last = self.middle
        x = self.run(last, self.run(first, outputs[-1], emb, seq), emb, replace(seq, last=True))
        skips = [skip(z, seq) for skip, z in zip(self.skips, outputs)] or [seq.noised_only(z) for z in outputs]
        return skips, x

    def forward(self, x, emb, seq):
        """x: (b s t) c h w, emb: (b s t) e -> (b r t) c h w of the frames to be denoised."""
        skips, x = self.encode(x, emb, seq)
        emb = seq.noised_only(emb)
        for block in self.decoder:
            x = self.run(block, x if block.resample else mp_cat(x, skips.pop()), emb, ALONE)
        return self.head(x) * self.head_gain


# ---------------------------------------------------------------------------------------------------
# The denoiser: EDM's preconditioning around the UNet, and the learned log-variance of its error.

CLEAN_SIGMA = 0.002                                         # noise level that a clean frame is told to have


class Denoiser(nn.Module):
    """D(x; sigma), the estimate of a clean frame given its noised self and the clean frames before it. Frames are given
    and returned with zero mean and standard deviation `sigma_data`; sigma is in the same unit."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32                          # that the UNet computes in; weights are float32
        c_io = cfg.frame_shape[0] * cfg.patch_size ** 2
        c_emb = cfg.channels * max(cfg.channel_mults)
        self.noise_features = MPFourier(cfg.channels)
        self.noise_emb = MPLinear(c_emb, cfg.channels)
        self.action_emb = MPLinear(c_emb, cfg.action_dim) if cfg.action_dim else None
        self.unet = UNet(c_io, c_emb, cfg)
        self.error_features = MPFourier(128, inputs=2)
        self.error_log_variance = MPLinear(1, 128)
        for number, layer in enumerate(self.modules()):
            layer.number = number                           # by which caches know it: of a copy, too

    def forward(self, x, sigma, actions=None):
        """The training pass. x: b s t c h w, copy 0 clean; sigma: b s t, noise level of every frame (0 if clean);
        actions: b t (discrete) or b t a (continuous), a_t led to frame t; -1 or NaN: unknown.
        -> D: b r t c h w of the r = s - 1 noised copies; u: b r t, log of the squared error expected of them, times
        lambda(sigma) (EDM2 Eq. 21)."""
        self.check(x, sigma, actions, "b s t")
        require(x.shape[1] > 1, f"frames: expected at least 2 copies, given {tuple(x.shape)}", ValueError)
        seq = Sequence(copies=x.shape[1], frames=x.shape[2])
        return self.denoise(x, sigma, actions, seq), self.log_variance(sigma[:, 1:])

    @torch.no_grad()
    def step(self, x, sigma, cache, actions=None):
        """Denoises one frame that follows those in the cache. x: b 1 c h w; sigma: b 1 -> D: b 1 c h w."""
        self.check(x, sigma, actions, "b t")
        require(x.shape[1] == 1, f"{x.shape[1]} noised frames given: they are denoised one at a time", ValueError)
        return self.denoise(x[:, None], sigma[:, None], actions, Sequence(cache=cache))[:, 0]

    @torch.no_grad()
    def read(self, x, sigma, cache, actions=None):
        """Writes clean frames into the cache, one after another, behind those in it. x: b t c h w; sigma: b t, their
        noise levels."""
        self.check(x, sigma, actions, "b t")
        for t in range(x.shape[1]):
            now = slice(t, t + 1)
            acted = None if actions is None else actions[:, now]
            inputs = self.unet_inputs(x[:, None, now], sigma[:, None, now], acted)
            self.unet.encode(*inputs, Sequence(cache=cache, commit=True))
            cache.advance()

    def unet_inputs(self, x, sigma, actions):
        """The frames with unit variance, folded, (b s t) c h w, and what is told of them, (b s t) e."""
        n, c_in = self.cfg.patch_size, (sigma ** 2 + self.cfg.sigma_data ** 2).rsqrt()
        folded = rearrange(x * c_in[..., None, None, None], "b s t c (h y) (w x) -> (b s t) h w (c y x)", y=n, x=n)
        return folded.movedim(-1, 1).to(self.dtype), self.embed(sigma, actions).flatten(0, 2)

    def denoise(self, x, sigma, actions, seq):
        """EDM's preconditioning (EDM Table 1). x: b s t c h w -> D of the frames to be denoised, b r t c h w."""
        n, sd = self.cfg.patch_size, self.cfg.sigma_data
        if x.is_cuda and seq.cache is None:
            seq.masks = self.block_masks(seq, x.device)
        f = self.unet(*self.unet_inputs(x, sigma, actions), seq).float().movedim(1, -1)
        x, sigma = seq.noised(x), seq.noised(sigma)
        f = rearrange(f, "(b r t) h w (c y x) -> b r t c (h y) (w x)", r=x.shape[1], t=x.shape[2], y=n, x=n)
        c_in = (sigma ** 2 + sd ** 2).rsqrt()[..., None, None, None]
        return x * (sd * c_in) ** 2 + f * (sigma[..., None, None, None] * sd * c_in)

    def block_masks(self, seq, device):
        """{positions per frame: mask}. Made here and not in the UNet, which may be compiled, they are made once."""
        _, height, width = self.cfg.frame_shape
        sizes = {h * h * width // height for h in self.cfg.video_attn_resolutions}
        return {p: block_mask(seq.copies, seq.frames, p, self.cfg.window, device) for p in sizes}

    def embed(self, sigma, actions):
        """What every block is told about a frame, its noise level and its action: b s t e."""
        emb = self.noise_emb(self.noise_features(noise_label(sigma)[..., None]))
        if self.action_emb is not None:
            known = actions.isfinite().all(-1) if actions.is_floating_point() else actions >= 0
            if not actions.is_floating_point():
                actions = F.one_hot(actions.long().clamp(min=0), self.cfg.action_dim) * math.sqrt(self.cfg.action_dim)
            acted = self.action_emb(actions.float().nan_to_num())[:, None].expand_as(emb)
            emb = torch.where(known[:, None, :, None], mp_sum(emb, acted, 0.5), emb)
        return mp_silu(emb)

    def log_variance(self, sigma):
        """u(sigma, t). The frame's position counts: the first frame has no past and is harder than the rest."""
        position = torch.log1p(torch.arange(sigma.shape[-1], device=sigma.device)).expand_as(sigma)
        features = self.error_features(torch.stack([noise_label(sigma), position], dim=-1))
        return self.error_log_variance(features).sum(-1)    # drops an axis of size 1; a view would make FSDP warn

    def check(self, x, sigma, actions, layout):
        """ValueError that names the expected and the given shape; layout: b s t or b t."""
        size, action_dim = tuple(self.cfg.frame_shape), self.cfg.action_dim
        leading = tuple(x.shape[:len(layout.split())])
        vector = (action_dim,) if actions is not None and actions.is_floating_point() else ()
        wanted = {"frames": (x, leading + size), "sigma": (sigma, leading),
                  "actions": (actions, (leading[0], leading[-1], *vector) if action_dim else "none")}
        for name, (tensor, expected) in wanted.items():
            given = "none" if tensor is None else tuple(tensor.shape)
            require(given == expected, f"{name}: expected {expected}, given {given} (frames are {layout} + {size}, "
                                       f"with action_dim {action_dim})", ValueError)

    @torch.no_grad()
    def normalize_weights(self):
        """Back to the sphere, after every optimizer step and after loading averaged weights (EDM2 Eq. 66)."""
        for weight in (p for p in self.parameters() if p.ndim > 1):                     # all but the gains
            weight.copy_(unit_rms(weight, tuple(range(1, weight.ndim))))

    @torch.no_grad()
    def project_gradients(self):
        """Remove from every gradient its part along the weight, before the optimizer step (EDM2 Eq. 47)."""
        for weight in (p for p in self.parameters() if p.ndim > 1 and p.grad is not None):
            along = (weight * weight.grad).mean(tuple(range(1, weight.ndim)), keepdim=True)       # |w|^2 = fan in
            weight.grad.addcmul_(weight, along, value=-1)


def noise_label(sigma):
    """c_noise = log(sigma) / 4 (EDM Table 1); a clean frame counts as sigma = `CLEAN_SIGMA`."""
    return sigma.clamp(min=CLEAN_SIGMA).log() / 4
