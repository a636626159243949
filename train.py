"""Trains the denoiser on every frame of every clip in one pass.

    python train.py config/mnist.py                              # digits: minutes on a CPU
    torchrun --nproc_per_node=8 train.py config/video.py         # your own clips on eight GPUs

Interrupt it when you like: it saves, and the same command goes on from there.
"""
import collections
import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_map
from tqdm import tqdm

import sample
from config import UserError, all_finite, at_least, not_default, one_of, plain_settings, require
from config import run as run_script
from data import Batches, load_batch, measure, open_source, replacing, to_network, unit_actions
from model import Denoiser, ModelConfig

# -- output
out_dir = "out/mnist"           # checkpoints, log.jsonl and pictures go here
init_from = "auto"              # auto: go on from out_dir's checkpoint; changed: with other settings too; scratch: no
tensorboard = False             # write the log for TensorBoard too
log_interval = 20               # optimizer steps between lines in log.jsonl
eval_interval = 500             # optimizer steps between evaluations, each with a picture; 0: never
checkpoint_interval = 500       # optimizer steps between checkpoints with snapshots; evaluations save one too
# -- data
dataset = "digits"              # digits or world (made on the fly), or video (a prepared folder)
data_dir = "data/mnist"         # folder of the MNIST files, or of the prepared clips
frames = 12                     # frames per clip; more than `window`, so that training sees full windows
frame_size = 32                 # pixels, height and width
digits = 1                      # digits per clip, or strewn over the world's canvas
digit_size = 20                 # pixels
stride = 1                      # of video: a clip takes every stride-th frame of a file
flip = False                    # of video: mirror half of the training clips
action_dropout = 0.0            # share of clips whose actions are hidden, so that the model also works without
speed = (1.0, 3.0)              # slowest and fastest, pixels per frame; of a world: the first, pixels per move
canvas_size = 64                # pixels of the world's canvas, height and width
whole_pixels = True             # whole-pixel velocities: each frame is an exact shift of the last
bounce = "reflect"              # at the walls: reflect, or random (a new direction)
# -- model
patch_size = 4                  # n x n pixels are folded into channels before the UNet
channels = 32                   # at the finest level
channel_mults = (1, 2)          # per level; each level halves the resolution
blocks_per_level = 1            # residual blocks per level
video_attn_resolutions = (4,)   # feature map heights with attention: over the past, in the decoder within a frame
frame_attn_resolutions = ()     # ... with attention within a frame alone
head_dim = 32                   # attention head dimension; a power of two, 16 to 64
window = 8                      # frames that attention sees, the present one included
temporal_kernel = 2             # frames that convolutions before the decoder see, the present one included
dropout = 0.0                   # in the residual branches
sigma_data = 0.5                # standard deviation that frames are scaled to
# -- loss
noised_copies = 1               # noised copies of each clip that share one clean copy
P_mean = -0.4                   # mean of log sigma in training
P_std = 1.4                     # its standard deviation
context_noise = 0.0             # largest noise level of the clean copy, drawn per clip; steadies long rollouts
# -- optimisation
batch_size = 4                  # clips per optimizer step, over all processes
accumulate = 1                  # micro-batches that each optimizer step is computed in
max_steps = 3000                # optimizer steps
optimizer = "muon"              # muon: orthogonal steps, of which fewer are needed; or adam
lr = 0.02                       # peak learning rate: how far a step moves a weight, of 1 on average
warmup_steps = 100              # steps of linear warm-up
decay = "linear"                # linear: from the first step on, to 0 at max_steps; sqrt: lr / sqrt(step / ref_steps)
ref_steps = 1000                # step at which the sqrt decay sets in
grad_clip = 1.0                 # largest gradient norm; larger ones are scaled down
max_skipped = 20                # steps in a row without a finite gradient, after which the run ends
ema_widths = (0.05, 0.1)        # power-function averages of the weights, as fractions of the run
# -- evaluation
eval_clips = 32                 # held-out clips per evaluation
eval_sigmas = (0.1, 0.3, 1.0, 3.0, 10.0)    # noise levels of the error table
eval_context = 4                # frames before those of the error table's second row; as many are given in pictures
picture_frames = 16             # frames in the pictures, the given ones included; no more than a clip has
picture_steps = 6               # Euler steps per frame in the pictures
# -- system
seed = 0                        # of weights, data and noise
device = "auto"                 # auto, cpu, cuda, ..
compile = False                 # torch.compile the network: a minute or more to start, faster steps
shard = False                   # spread weights, averages and optimizer over the processes, if one cannot hold them
recompute = False               # run each block again in the backward pass: less memory, a quarter more time

FREE_TO_CHANGE = {"init_from", "out_dir", "data_dir", "log_interval", "eval_interval", "checkpoint_interval",
                  "tensorboard", "device", "compile", "shard", "recompute", "accumulate", "max_skipped", "eval_clips",
                  "eval_sigmas", "eval_context", "picture_frames", "picture_steps"}

UNUSED = {"digits": {"stride", "flip", "canvas_size", "action_dropout"},                 # dataset -> what it ignores
          "world": {"stride", "flip", "bounce", "whole_pixels"},
          "video": {"digits", "digit_size", "speed", "canvas_size", "whole_pixels", "bounce"}}


# ---------------------------------------------------------------------------------------------------
# Processes: one, or those that torchrun started.

def start_processes(cfg):
    """(device, rank, world size); joins the process group if torchrun set one up."""
    if "LOCAL_RANK" not in os.environ:
        return sample.pick_device(cfg.device), 0, 1
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available() if cfg.device == "auto" else cfg.device != "cpu"
    device = sample.pick_device(f"cuda:{local_rank}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":           # several nodes may count their restarts differently
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)       # none of dead processes' keys
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size,
                            device_id=device if on_gpu else None)
    return device, rank, world_size


def sum_over_ranks(x):
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def any_process(happened, device):
    """Whether the list `happened` has an entry in this process or in any other."""
    if not dist.is_initialized():
        return bool(happened)
    return sum_over_ranks(torch.tensor(len(happened), device=device)) > 0


def gathered(tree):
    """The tree with its sharded tensors gathered on the CPU. All processes have to take part."""
    return tree_map(lambda x: x.full_tensor().cpu() if isinstance(x, DTensor) else x, tree)


def sharded_like(parameter, x):
    """The whole tensor x, sharded as the parameter is (if it is, and x is of its shape)."""
    if not isinstance(parameter, DTensor) or x.shape != parameter.shape:
        return x
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


# ---------------------------------------------------------------------------------------------------
# The loss (EDM2 Eq. 14 to 21), on the noised copies of every frame.

def draw_noise(samples, copies, shape, cfg, device):
    """Noise for the clips with the global numbers `samples`, each a function of (seed, number) alone:
    log sigma's standard normal b r t, the noise b r t c h w, and context noise: its level b and itself b t c h w."""
    drawn = []
    for number in samples:
        g = sample.seeded(device, cfg.seed, number)
        draw = [torch.randn(copies, shape[0], generator=g, device=device),
                torch.randn(copies, *shape, generator=g, device=device)]
        if cfg.context_noise:
            level = cfg.context_noise * torch.rand([], generator=g, device=device)
            draw += [level, torch.randn(shape, generator=g, device=device)]
        drawn.append(draw)
    return [torch.stack(parts) for parts in zip(*drawn, strict=True)]


def clean_and_noised(clips, sigma, noise, context_sigma=None, context_noise=None):
    """The sequence of a training pass: x b (1 + r) t c h w and the noise level of each of its frames b (1 + r) t.
    clips: b t c h w; sigma: b r t; noise: b r t c h w; context noise: its level b and itself, or None."""
    noised = clips[:, None] + sigma[..., None, None, None] * noise
    clean, clean_sigma = clips, torch.zeros_like(sigma[:, 0])
    if context_sigma is not None:
        clean_sigma = clean_sigma + context_sigma[:, None]
        clean = clips + clean_sigma[..., None, None, None] * context_noise
    return torch.cat([clean[:, None], noised], dim=1), torch.cat([clean_sigma[:, None], sigma], dim=1)


def hide_actions(actions, samples, cfg):
    """The actions of a share of the clips made unknown: a function of (seed, number)."""
    hidden = [torch.rand([], generator=sample.seeded("cpu", cfg.seed, number, 2)) < cfg.action_dropout
              for number in samples]
    hidden = torch.stack(hidden).to(actions.device, non_blocking=True).view(-1, *[1] * (actions.ndim - 1))
    return actions.masked_fill(hidden, math.nan if actions.is_floating_point() else -1)


def loss_of(model, clips, actions, noise, cfg):
    """Mean over clips, copies and frames of lambda(sigma) / exp(u) * squared error + u."""
    z, eps, *context = noise
    sigma = (cfg.P_mean + cfg.P_std * z).exp()
    x, sigmas = clean_and_noised(clips, sigma, eps, *context)
    denoised, u = model(x, sigmas, actions)
    weight = (sigma ** 2 + cfg.sigma_data ** 2) / (sigma * cfg.sigma_data) ** 2
    error = (denoised - clips[:, None]).square().mean(dim=(-3, -2, -1))
    return (weight / u.exp() * error + u).mean()


# ---------------------------------------------------------------------------------------------------
# The optimizer, its learning rate, averaged weights.

def matrix(weight):
    """c_out, all else; a vector is one row."""
    return weight.flatten(1) if weight.ndim > 1 else weight[None]


def orthogonal(matrices):
    """About U V^T of each matrix U S V^T; all have the same shorter side. Five Newton-Schulz steps x <- p(x x^T) x with
    Jordan's p(s) = 3.4445 - 4.7750 s + 2.0315 s^2 (Jordan et al. 2024, Muon) bring all singular values above 1/650 of
    the norm to between 0.7 and 1.2. As x x^T is a small square matrix, the five p are multiplied together first,
    batched over all matrices, and then with each x once."""
    wide = [x if x.shape[0] <= x.shape[1] else x.mT for x in matrices]
    wide = torch._foreach_div(wide, torch._foreach_add(torch._foreach_norm(wide), 1e-20))
    square = torch.stack([x @ x.mT for x in wide])
    identity = torch.eye(square.shape[-1], device=square.device)

    def polynomial(square):
        return torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315).add_(identity, alpha=3.4445)
    step = product = polynomial(square)
    for _ in range(4):
        square = step @ square @ step
        step = polynomial(square)
        product = step @ product
    moves = [steps @ x for steps, x in zip(product, wide, strict=True)]
    return [move if move.shape == x.shape else move.mT for move, x in zip(moves, matrices, strict=True)]


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum of each weight matrix (c_out, all else), scaled to a root mean square
    of lr, or less: directions that gradients seldom point in are learnt as fast as the rest (Jordan et al. 2024)."""

    def __init__(self, parameters, lr=0.0, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        alike = collections.defaultdict(list)               # shorter side -> [(parameter, momentum)]
        for p in group["params"]:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            average = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
            ahead = torch.lerp(p.grad, average, group["momentum"])                       # Nesterov's
            alike[min(matrix(p).shape)].append((p, ahead))
        for pairs in alike.values():                        # a group at a time, as sharded momenta are gathered whole
            ahead = [matrix(x.full_tensor() if isinstance(x, DTensor) else x) for _, x in pairs]
            for (p, _), move in zip(pairs, orthogonal(ahead), strict=True):
                p.sub_(sharded_like(p, move.reshape(p.shape)), alpha=group["lr"] * max(move.shape) ** 0.5)


def make_optimizer(model, cfg):
    if cfg.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    return Muon(model.parameters())


def learning_rate(step, cfg):
    """Linear warm-up, times a linear decay to 0 at max_steps, or 1 / sqrt(step / ref_steps) (EDM2 Eq. 67)."""
    rate = cfg.lr * min(1, (step + 1) / max(cfg.warmup_steps, 1))
    if cfg.decay == "linear":
        return rate * (1 - step / cfg.max_steps)
    return rate / math.sqrt(max(step / cfg.ref_steps, 1))


class PowerEMA:
    """Averages of the weights with weight t^gamma for those of step t, one per width (EDM2 section 3.1)."""

    def __init__(self, model, widths):
        self.parameters = dict(model.named_parameters())
        self.exponents = {width: sample.ema_exponent(width) for width in widths}
        self.averages = {width: {name: p.detach().clone() for name, p in self.parameters.items()} for width in widths}

    @torch.no_grad()
    def update(self, step):
        """After optimizer step `step` (1 is the first)."""
        for width, average in self.averages.items():
            beta = (1 - 1 / step) ** (self.exponents[width] + 1)
            torch._foreach_lerp_(list(average.values()), list(self.parameters.values()), 1 - beta)

    @torch.no_grad()
    def load(self, averages):
        for width, average in self.averages.items():
            for name, tensor in average.items():            # a width that is new starts from the current weights
                tensor.copy_(sharded_like(tensor, averages.get(width, self.parameters)[name]))


def averaged_model(new, model, average, device):
    """`new`, a model like `model`, with its averaged weights, back on the sphere, in eval mode."""
    new.load_state_dict(gathered(model.state_dict() | average))
    new.normalize_weights()
    new.dtype = model.dtype
    return new.eval().requires_grad_(False).to(device)


# ---------------------------------------------------------------------------------------------------
# Evaluation: denoising error by noise level, without and with context, and a picture.

@torch.no_grad()
def error_table(model, source, stats, cfg, device, rank=0, world_size=1):
    """Squared error of the denoised frames over the data variance: noise levels x (first frame, frames with at
    least `eval_context` frames of context). All levels are noised copies of one pass."""
    sigmas = torch.tensor(cfg.eval_sigmas, device=device)
    total, count = torch.zeros(len(sigmas), source.frames, device=device), torch.zeros([], device=device)
    size = max(1, min(8, cfg.batch_size // (cfg.accumulate * world_size)))               # at most a micro-batch
    for first in range(rank * size, cfg.eval_clips, world_size * size):
        numbers = range(first, min(first + size, cfg.eval_clips))
        clips, actions = load_batch(source, numbers, device)
        clips, actions = to_network(clips, stats, cfg.sigma_data), unit_actions(actions, stats)
        generators = [sample.seeded(device, cfg.seed, number, 1) for number in numbers]
        eps = torch.stack([torch.randn(len(sigmas), *clips.shape[1:], generator=g, device=device) for g in generators])
        sigma = sigmas[None, :, None].expand(eps.shape[:3])
        denoised, _ = model(*clean_and_noised(clips, sigma, eps), actions)
        total += (denoised - clips[:, None]).square().mean(dim=(-3, -2, -1)).sum(0)
        count += len(numbers)
    error = sum_over_ranks(total) / sum_over_ranks(count) / cfg.sigma_data ** 2
    return torch.stack([error[:, 0], error[:, cfg.eval_context:].mean(1)], dim=1).tolist()


def draw_picture(path, model, source, stats, cfg, device):
    """Held-out clips, each above a rollout from its first frames."""
    clips, actions = load_batch(source, range(4), device)
    length, levels = min(cfg.picture_frames, source.frames), sample.noise_levels(cfg.picture_steps)
    settings = {"levels": levels, "seed": cfg.seed, "context_noise": cfg.context_noise / 2}
    made = sample.roll_out(model, clips, cfg.eval_context, length, stats, settings, actions)
    sample.write(path, sample.with_truth(clips, made), cfg.eval_context, scale=2)


# ---------------------------------------------------------------------------------------------------
# Checkpoints and the log.

class Writer:
    """Saves states in a thread, so that training need not wait for a disk. The next `wait` tells of a failure, and a
    second one in a row ends the run; the file that it should have replaced stays as it was."""

    def __init__(self):
        self.thread, self.pending, self.failures = ThreadPoolExecutor(1), [], 0

    def save(self, state, path, keep=None):
        buffer = io.BytesIO()
        torch.save(state, buffer)                           # to host memory: from here on, training may change it

        def write():
            with replacing(path, keep) as temporary:
                temporary.write_bytes(buffer.getbuffer())
        self.pending.append(self.thread.submit(write))

    def wait(self, final=False):
        """Until what was given is on the disk. UserError for a second failure in a row, or for any at the end."""
        errors = [write.exception() for write in self.pending if write.exception()]
        if self.pending:
            self.failures = self.failures + 1 if errors else 0
        self.pending = []
        if errors and (final or self.failures > 1 or not isinstance(errors[0], UserError)):
            raise errors[0]
        if errors:
            print(f"\n{errors[0]}: the checkpoint before it is kept, and training goes on", flush=True)


@contextlib.contextmanager
def nonfatal(what):
    """A block that a run can do without: whatever it raises is printed, and training goes on."""
    try:
        yield
    except Exception as error:
        print(f"\n{what}: {str(error) or repr(error)}; training goes on", flush=True)


def json_safe(value):
    """`value` as JSON has it, with null for numbers that are not finite: NaN is no JSON."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def read_log(path):
    """The entries of a log, if there is one, without lines that were cut off."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(entry := json.loads(line), dict):
                yield entry


def draw_log(folder):
    """log.png: what log.jsonl says, over the steps. Nothing without matplotlib."""
    if not importlib.util.find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure
    entries = list(read_log(folder / "log.jsonl"))
    losses, tables = ([entry for entry in entries if key in entry] for key in ("loss", "sigmas"))
    tables = [entry for entry in tables if entry["sigmas"] == tables[-1]["sigmas"]]     # a run may go on with others
    figure = Figure((13, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True).flat
    for axis, name in zip(axes[:4], ("loss", "lr", "grad_norm", "frames_per_second")):
        axis.plot([entry["step"] for entry in losses], [entry[name] for entry in losses], "k-", linewidth=0.8)
        axis.set(title=name.replace("_", " "), xlabel="step")
    for column, (axis, title) in enumerate(zip(axes[4:], ("error, first frame", "error, frames with context"))):
        for i, (sigma, marker) in enumerate(zip(tables[-1]["sigmas"], itertools.cycle("osv^D*x"))):
            errors = [entry["first_and_later_error"][i][column] for entry in tables]
            axis.plot([entry["step"] for entry in tables], errors, marker=marker, label=f"sigma {sigma:g}")
        axis.set(title=title, xlabel="step", yscale="log")
        axis.legend()
    with replacing(folder / "log.png") as temporary:
        figure.savefig(temporary, format="png")


# ---------------------------------------------------------------------------------------------------
# A run: what a checkpoint holds, and where it runs.

def check_settings(cfg):
    """UserError for what would otherwise fail late; a remark for settings that have no effect."""
    idle = not_default(cfg, globals()) & UNUSED.get(cfg.dataset, set())
    remarks = {f"dataset={cfg.dataset} makes no use of {', '.join(sorted(idle))}": idle,
               f"frames={cfg.frames}: no frame will see window={cfg.window} frames":
               cfg.video_attn_resolutions and cfg.frames < cfg.window,
               f"frames={cfg.frames} cannot train temporal_kernel={cfg.temporal_kernel}":
               cfg.frames < cfg.temporal_kernel}
    for remark in (text for text, true in remarks.items() if true and os.environ.get("RANK", "0") == "0"):
        print(remark, flush=True)
    at_least(cfg, 1, "max_steps", "noised_copies", "eval_clips", "log_interval", "checkpoint_interval", "channels",
             "patch_size", "blocks_per_level", "batch_size", "accumulate", "max_skipped", "ref_steps", "picture_steps")
    at_least(cfg, 0, "seed", "eval_interval", "eval_context", "context_noise", "action_dropout", "dropout", "P_std",
             "warmup_steps")
    all_finite(cfg, "grad_clip")
    require(cfg.seed < 2 ** 63, f"seed={cfg.seed}: must be less than 2 ** 63")
    for name in ("frames", "picture_frames"):
        require(getattr(cfg, name) > cfg.eval_context,
                f"{name}={getattr(cfg, name)}: must be more than eval_context={cfg.eval_context}")
    for name in ("grad_clip", "sigma_data", "lr", "eval_sigmas", "ema_widths", "channel_mults"):
        value = getattr(cfg, name)
        least = min(value, default=0) if isinstance(value, tuple) else value
        require(least > 0, f"{name}={value}: give numbers above 0")
    require(max(cfg.ema_widths) <= 0.25, f"ema_widths={cfg.ema_widths}: shares of the run, at most 0.25")
    require(max(cfg.dropout, cfg.action_dropout) <= 1, "dropout and action_dropout are shares, at most 1")
    one_of(cfg, init_from=("auto", "changed", "scratch"), decay=("linear", "sqrt"), optimizer=("muon", "adam"))
    require(not (cfg.shard and cfg.compile), "shard=True and compile=True have not been made to work together: set one")
    require(not cfg.shard or "LOCAL_RANK" in os.environ, "shard=True is for several processes: start with torchrun")
    require(not cfg.tensorboard or importlib.util.find_spec("tensorboard"),
            "tensorboard=True: TensorBoard is not installed: pip install tensorboard")


def build_model(cfg, source, device):
    fields = {name: getattr(cfg, name) for name in ModelConfig.__dataclass_fields__ if hasattr(cfg, name)}
    model = Denoiser(ModelConfig(frame_shape=tuple(source.shape), action_dim=source.action_dim, **fields))
    values, channels = source.shape[0] * cfg.patch_size ** 2, cfg.channels * cfg.channel_mults[0]
    require(values <= channels, f"patch_size={cfg.patch_size}: a patch holds {values} values, and {channels} channels "
                                "cannot tell the noise of all: set more channels, or a smaller patch_size")
    require(device.type != "cuda" or cfg.head_dim >= 16 or cfg.window == 1 or not cfg.video_attn_resolutions,
            f"head_dim={cfg.head_dim}: FlexAttention, which a GPU uses, needs at least 16")
    return model.to(device)


def compiled(model):
    """The model, its UNet compiled for the shapes of this run."""
    torch._dynamo.config.recompile_limit = 64               # all blocks are compilations of one `Block.forward`
    model.unet.compile(dynamic=False)
    return model


class Run:
    def __init__(self, cfg):
        check_settings(cfg)
        self.cfg, self.folder = cfg, Path(cfg.out_dir)
        self.path, self.previous = self.folder / "checkpoint.pt", self.folder / "checkpoint-previous.pt"
        self.device, self.rank, self.world_size = start_processes(cfg)
        if self.rank > 0:                                   # the first process comes first, alone: it may download
            dist.barrier()
        self.source, self.held_out = open_source(cfg, "train"), open_source(cfg, "val")
        if self.rank == 0 and dist.is_initialized():
            dist.barrier()
        self.stats = measure(self.source)
        torch.manual_seed(cfg.seed)
        self.model = build_model(cfg, self.source, self.device)
        self.model.dtype = sample.compute_dtype(self.device)
        if cfg.shard:                                       # a block's weights are gathered while it runs (FSDP)
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for block in (*self.model.unet.encoder, *self.model.unet.middle, *self.model.unet.decoder, self.model):
                fully_shard(block, mesh=mesh)
        self.optimizer = make_optimizer(self.model, cfg)
        self.ema = PowerEMA(self.model, cfg.ema_widths)
        self.step, self.recent, self.changed = 0, [], False     # steps done; losses not yet logged; resumed otherwise
        self.writer = Writer()
        self.resume(self.path)
        self.network = compiled(self.model) if cfg.compile else self.model
        if self.world_size > 1 and not cfg.shard:
            with warnings.catch_warnings():                 # torch 2.13 has another name for it, 2.9 has not
                warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
                self.network = DistributedDataParallel(self.network, broadcast_buffers=False,      # they never change
                                                       gradient_as_bucket_view=True)               # and not twice
        self.board = None
        if cfg.tensorboard and self.rank == 0:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(self.folder, purge_step=self.step + 1)
        self.start_log()

    def resume(self, path):
        """Goes on from the checkpoint at `path`, if there is one, or from the one before if that cannot be read."""
        if not path.exists() and not self.previous.exists():
            old = any(self.folder.glob("ema-*.pt"))
            return require(not old, f"{self.folder} holds snapshots ema-*.pt of another run: move them away")
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"             # by torchrun: the same run
        require(restarted or self.cfg.init_from != "scratch", f"{path} holds a run already, which init_from=scratch "
                "would overwrite: choose another out_dir, or move it away")
        try:
            state = sample.load_file(path, sample.CHECKPOINT_KEYS)
        except UserError as error:
            path = self.previous
            if not path.exists():
                raise
            state = sample.load_file(path, sample.CHECKPOINT_KEYS)
            if self.rank == 0:
                print(f"{error}; taking the one before it")
                with contextlib.suppress(FileNotFoundError):            # else the next save keeps it as previous
                    self.path.replace(self.folder / "checkpoint-damaged.pt")
        require(state["step"] <= self.cfg.max_steps, f"{path} is of step {state['step']} already, more than "
                                                     f"max_steps={self.cfg.max_steps}: set more, or another out_dir")
        old, new = plain_settings(globals()) | state["settings"], vars(self.cfg)         # missing ones had the default
        changed = [f"{key} was {old.get(key)!r}, now {new[key]!r}" for key in new
                   if key not in FREE_TO_CHANGE and old.get(key) != new[key]]
        moved = f" {Path(new['data_dir'])}".join(state["origin"].rsplit(f" {Path(old['data_dir'])}", 1))    # its folder
        if moved != self.source.origin:
            changed.append(f"the data were {state['origin']}, now {self.source.origin}")
        require(not changed or self.cfg.init_from == "changed",
                f"{path} is of a run with other settings: {'; '.join(changed)}. Choose another out_dir, or repeat the "
                "run's settings to go on with it, or set --init_from=changed to go on with these")
        own = self.model.state_dict()
        try:
            self.model.load_state_dict({name: sharded_like(own.get(name), x) for name, x in state["model"].items()})
        except RuntimeError as error:
            before, now = state["model_config"], asdict(self.model.cfg)
            other = "; ".join(f"{key} was {before[key]!r}, now {now[key]!r}" for key in now if before[key] != now[key])
            raise UserError(f"{path} is of another network: {other or error}") from error
        if old.get("optimizer") == new["optimizer"]:        # another one begins without moments
            parameters = [*self.model.parameters()]         # an optimizer's state is numbered like them
            for number, moments in state["optimizer"]["state"].items():
                moments.update({key: sharded_like(parameters[number], x) for key, x in moments.items()})
            self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load(state["ema"])
        if changed and self.rank == 0:
            print(f"going on with other settings: {'; '.join(changed)}", flush=True)
        self.step, self.recent = state["step"], state["recent"]
        self.stats = self.stats | {key: state["stats"].get(key) for key in ("mean", "std", "action_rms")}  # as trained
        self.changed = bool(changed)
        if self.rank == 0:
            print(f"resuming {path} at step {self.step} of {self.cfg.max_steps}", flush=True)

    def start_log(self):
        """On rank 0: removes log lines and snapshots of steps after this one, then prints and logs what is trained."""
        if self.rank > 0:
            return
        path, origin = self.folder / "log.jsonl", self.source.origin
        kept = [entry for entry in read_log(path) if self.step and entry["step"] <= self.step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        for path in self.folder.glob("ema-*.pt"):
            if (step := path.stem.removeprefix("ema-")).isdecimal() and int(step) > self.step:
                path.unlink()
        count = sum(p.numel() for p in self.model.parameters())
        print(f"{count / 1e6:.2f} million parameters on {self.world_size} x {self.device.type}; {origin}", flush=True)
        if self.step == 0 or self.changed:
            self.log(step=self.step, parameters=count, origin=origin, settings=vars(self.cfg))

    def log(self, **entry):
        """Adds a line to log.jsonl, a JSON object; only rank 0 writes."""
        if self.rank == 0:
            with nonfatal(path := self.folder / "log.jsonl"), open(path, "a") as file:
                file.write(json.dumps(json_safe(entry)) + "\n")
            for name, value in entry.items() if self.board else ():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, entry["step"])

    def save(self):
        """Everything that resuming and sampling need, in checkpoint.pt; every `checkpoint_interval` steps the
        averages too, in a file of their own, for reconstructing other widths."""
        state = {"version": sample.VERSION, "step": self.step, "settings": vars(self.cfg), "stats": self.stats,
                 "model_config": asdict(self.model.cfg), "origin": self.source.origin,
                 "recent": [float(loss) for loss in self.recent],
                 "model": gathered(self.model.state_dict()), "optimizer": gathered(self.optimizer.state_dict()),
                 "ema": gathered(self.ema.averages)}
        if self.rank > 0:
            return
        self.writer.wait()
        require(all(x.isfinite().all() for x in state["model"].values()),
                f"step {self.step}: weights are not finite; the last checkpoint is kept. Lower lr")
        self.writer.save(state, self.path, keep=self.previous)
        if self.due(self.cfg.checkpoint_interval):
            halved = tree_map(torch.Tensor.half, state["ema"])
            self.writer.save({"step": self.step, "ema": halved}, self.folder / f"ema-{self.step:08d}.pt")

    def due(self, interval):
        """Whether something that happens every `interval` steps, and at the end, happens now."""
        return bool(interval) and (self.step % interval == 0 or self.step == self.cfg.max_steps)

    def evaluated(self):
        """Whether the log has the errors of the step that was last done."""
        entries = read_log(self.folder / "log.jsonl")
        return any(entry["step"] == self.step and "sigmas" in entry for entry in entries)

    def evaluate(self):
        """Error table and picture with the first averaged weights, printed, logged, drawn."""
        cfg, average = self.cfg, next(iter(self.ema.averages.values()))
        model = averaged_model(Denoiser(self.model.cfg), self.model, average, self.device)
        errors = error_table(model, self.held_out, self.stats, cfg, self.device, self.rank, self.world_size)
        if self.rank == 0:
            tqdm.write(f"step {self.step}: denoising error on held-out clips, as a fraction of the data variance\n"
                       f"  sigma             {''.join(f'{sigma:>8g}' for sigma in cfg.eval_sigmas)}\n"
                       f"  first frame       {''.join(f'{first:8.3f}' for first, _ in errors)}\n"
                       f"  {cfg.eval_context}+ given frames   {''.join(f'{later:8.3f}' for _, later in errors)}")
            self.log(step=self.step, sigmas=list(cfg.eval_sigmas), first_and_later_error=errors)
            for sigma, (first, later) in zip(cfg.eval_sigmas, errors, strict=True) if self.board else ():
                self.board.add_scalar(f"error, first frame/sigma {sigma:g}", first, self.step)
                self.board.add_scalar(f"error, frames with context/sigma {sigma:g}", later, self.step)
            with nonfatal("the log's picture"):
                draw_log(self.folder)
            with nonfatal("the picture of a rollout"):
                path = self.folder / f"rollout-{self.step:08d}.{'npy' if self.stats.get('latent') else 'png'}"
                draw_picture(path, model, self.held_out, self.stats, cfg, self.device)


# ---------------------------------------------------------------------------------------------------
# The training loop.

def gradients(network, batches, cfg, stats, device):
    """One optimizer step's gradients, over its micro-batches; returns its mean loss."""
    total = 0.0
    for micro in range(cfg.accumulate):
        samples, clips, actions = next(batches)
        clips, actions = to_network(clips, stats, cfg.sigma_data), unit_actions(actions, stats)
        actions = hide_actions(actions, samples, cfg) if cfg.action_dropout and actions is not None else actions
        noise = draw_noise(samples, cfg.noised_copies, clips.shape[1:], cfg, device)
        last = micro == cfg.accumulate - 1                  # then processes exchange gradients: once per optimizer step
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        with network.no_sync() if not last and hasattr(network, "no_sync") else contextlib.nullcontext():
            loss = loss_of(network, clips, actions, noise, cfg) / cfg.accumulate
            loss.backward()
        total += loss.detach()
    return total


def optimizer_step(model, optimizer, step, cfg):
    """One step, after which weights are back on the sphere; skipped if the gradient norm, returned, is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg)
    model.project_gradients()
    norm = gathered(clip_grad_norm_(model.parameters(), cfg.grad_clip)).item()
    if math.isfinite(norm):
        optimizer.step()
        model.normalize_weights()
    else:
        clips = f"clips {step * cfg.batch_size} to {(step + 1) * cfg.batch_size - 1}"
        print(f"\nstep {step}: the gradient norm is {norm}; the step is skipped ({clips})", flush=True)
    optimizer.zero_grad(set_to_none=True)
    return norm


def train(run, batches, bar, stop):
    """Steps until the end, or until any process was asked to stop."""
    cfg, skipped = run.cfg, 0
    frames = cfg.batch_size * cfg.noised_copies * run.source.frames         # of a step
    steps, seconds = 0, 0.0                                                 # since the last line of the log
    if run.step and run.due(cfg.eval_interval) and not run.evaluated():     # it was cut off
        run.evaluate()
    began = time.perf_counter()
    while run.step < cfg.max_steps and not any_process(stop, run.device):
        if cfg.dropout:
            torch.manual_seed(cfg.seed + run.step * run.world_size + run.rank)
        loss = gradients(run.network, batches, cfg, run.stats, run.device)
        norm = optimizer_step(run.model, run.optimizer, run.step, cfg)
        skipped = 0 if math.isfinite(norm) else skipped + 1
        require(skipped != cfg.max_skipped, f"step {run.step}: {skipped} gradients in a row were not finite; what was "
                                            "saved before is kept. Lower lr, or look at the clips named above")
        run.step, steps = run.step + 1, steps + 1
        run.ema.update(run.step)
        run.recent.append(sum_over_ranks(loss) / run.world_size)
        bar.update()
        seconds += time.perf_counter() - began
        if run.due(cfg.log_interval):
            mean = sum(map(float, run.recent)) / len(run.recent)
            bar.set_postfix(loss=f"{mean:.3f}")
            run.log(step=run.step, loss=mean, grad_norm=norm, lr=learning_rate(run.step - 1, cfg),
                    frames_per_second=round(steps * frames / seconds, 1))
            run.recent, steps, seconds = [], 0, 0.0
        if run.due(cfg.checkpoint_interval) or run.due(cfg.eval_interval):
            run.save()                                      # first: an evaluation may fail, out of memory, say
        if run.due(cfg.eval_interval):
            run.evaluate()
        began = time.perf_counter()


def main(cfg):
    run, stop = Run(cfg), []
    sample.stop_on_signals(stop, "the step, then saving")
    batches = Batches(run.source, cfg.batch_size, run.device, run.step, run.rank, run.world_size, cfg.accumulate)
    bar = tqdm(total=cfg.max_steps, initial=run.step, unit="step", disable=run.rank > 0, dynamic_ncols=True)
    with batches, bar, run.writer.thread, sample.compile_errors():
        train(run, batches, bar, stop)
        stopped = run.step < cfg.max_steps                  # this process was asked to, or another one
        if stopped:
            run.save()
    run.writer.wait(final=True)
    if run.rank == 0:
        print(f"{'stopped' if stopped else 'done'} at step {run.step}: {run.path}")
    run.network = None                                      # DDP ends before the process group, or threads may deadlock
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped:
        raise SystemExit(128 + (stop[0][0] if stop else signal.SIGTERM))


if __name__ == "__main__":
    run_script(main, globals())
