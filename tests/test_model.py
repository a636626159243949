"""The network, proved by equalities: what may depend on what, in one pass as frame by frame, at which magnitude.

`visible` is the contract written out once more; everything about the time axis is tested against it.
"""

import copy
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import model as m
from model import Cache, Denoiser, ModelConfig

CLEAN = 0


# ------------------------------------------------------------------------------------------------
# Helpers. What they know of the network's inside (layers, layout, hooks) is known here only.


def network(seed=0, **changes):
    """A small Denoiser, all gains random: at initialisation they are zero and would hide most of the network."""
    torch.manual_seed(seed)
    settings = {
        "frame_shape": (1, 8, 8), "patch_size": 1, "channels": 16, "channel_mults": (1, 2), "head_dim": 16,
        "video_attn_resolutions": (4,), "frame_attn_resolutions": (8,), "window": 3, "temporal_kernel": 2,
        "sigma_data": 0.8,
    }
    denoiser = Denoiser(ModelConfig(**settings | changes)).eval().requires_grad_(False)
    gains = {name: p for name, p in denoiser.named_parameters() if name.endswith(("gain", "sharpness"))}
    assert "unet.head_gain" in gains and len(gains) > 3
    for gain in gains.values():
        gain.uniform_(0.5, 1.5)
    return denoiser


def training_inputs(denoiser, copies=1, frames=6, b=2, seed=1):
    """x b s t c h w (copy 0 clean), sigma b s t and, where the model takes them, actions b t."""
    g = torch.Generator().manual_seed(seed)
    cfg = denoiser.cfg
    clips = cfg.sigma_data * torch.randn(b, 1, frames, *cfg.frame_shape, generator=g)
    sigma = torch.randn(b, copies, frames, generator=g).exp()
    noise = torch.randn(b, copies, frames, *cfg.frame_shape, generator=g)
    x = torch.cat([clips, clips + sigma[..., None, None, None] * noise], dim=1)
    actions = torch.randint(cfg.action_dim, (b, frames), generator=g) if cfg.action_dim else None
    return x, torch.cat([torch.zeros(b, 1, frames), sigma], dim=1), actions


def frame_by_frame(denoiser, x, sigma, actions=None, chunks=None, cache=None):
    """{t: D b r c h w} by incremental passes: the noised frames t, wherever a chunk of context has been read."""
    cache = cache or Cache(x.device)
    chunks = chunks or [1] * (x.shape[2] - 1)
    found, t = {}, 0
    for length in [*chunks, 0]:
        a = None if actions is None else actions[:, t:t + 1]
        found[t] = torch.cat([denoiser.step(x[:, s, t:t + 1], sigma[:, s, t:t + 1], cache, a)
                              for s in range(1, x.shape[1])], dim=1)
        if length:
            a = None if actions is None else actions[:, t:t + length]
            denoiser.read(x[:, 0, t:t + length], sigma[:, 0, t:t + length], cache, a)
            t += length
    return found


def features(denoiser, x, sigma, actions=None):
    """[(clean b t .., noised b r t ..)] of every block in a training pass; clean is None where it was dropped."""
    outputs = []
    blocks = [module for module in denoiser.modules() if isinstance(module, m.Block)]
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in blocks]
    denoiser(x, sigma, actions)
    for hook in hooks:
        hook.remove()
    assert len(outputs) == len(blocks) > 4
    b, s, t = x.shape[:3]
    split = []
    for out in outputs:
        copies = len(out) // (b * t)
        assert copies in (s, s - 1) and len(out) == b * t * copies, f"{len(out)} rows for {b} x {s} x {t} frames"
        out = out.unflatten(0, (b, copies, t))
        split.append((out[:, 0], out[:, 1:]) if copies == s else (None, out))
    assert split[0][0] is not None
    return split


def attention(window, channels=16):
    return m.Attention(channels, 16, window)


def causal_conv(kernel, channels=16):
    return m.CausalConv(channels, channels, kernel)


def through(layer, x, scale=None):
    """A layer that mixes time, over x: b s t c h w, without a cache; `scale` is the causal convolution's."""
    b, s, t = x.shape[:3]
    seq = m.Sequence(s, t)
    if isinstance(layer, m.Attention):
        out = layer(x.flatten(0, 2), seq)
    else:
        scale = torch.ones(b, s, t, len(layer.weight)) if scale is None else scale
        out = layer(x.flatten(0, 2), scale.flatten(0, 2), seq)
    return out.unflatten(0, (b, s, t))


def visible(s, t, reach):
    """The contract: the frames (copy, frame) that a layer reaching over `reach` frames may show frame (s, t)."""
    before = {(CLEAN, u) for u in range(t) if t - u < reach}
    return before | {(s, t)}


def rotated(x, start):
    positions = start + torch.arange(x.shape[-3])
    return m.rotate(x, *m.rotation(positions, x.shape[-1] // 2, x.dtype))


def attention_inputs(s, t, p, heads=2, d=16, b=2, device="cpu", dtype=torch.float32):
    """q, k, v: b m s t p d, of RMS 1 over d, as the cosine attention makes them."""
    g = torch.Generator().manual_seed(s + 10 * t + 100 * p)
    x = torch.randn(3, b, heads, s, t, p, d, generator=g)
    return [part.to(device, dtype).requires_grad_() for part in m.unit_rms(x, -1)]


def dense_attention(q, k, v, window):
    """Softmax over the whole sequence, with a mask made from `visible`."""
    s, t, p, d = q.shape[2:]
    mask = torch.zeros(s, t, p, s, t, p, dtype=torch.bool)
    for i in range(s):
        for j in range(t):
            for key in visible(i, j, window):
                mask[i, j, :, key[0], key[1]] = True
    q, k, v = (x.flatten(2, 4) for x in (q, k, v))                      # b m (s t p) d
    logits = (q @ k.mT / math.sqrt(d)).masked_fill(~mask.reshape(s * t * p, -1).to(q.device), -math.inf)
    return (logits.softmax(-1) @ v).unflatten(2, (s, t, p))


def gradients(y, inputs):
    """Of a fixed random function of y."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    return torch.autograd.grad((y * weight).sum(), inputs)


def rms(x, keep=()):
    return x.double().square().mean([dim for dim in range(x.ndim) if dim not in keep]).sqrt()


def farthest(a, b):
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


# ------------------------------------------------------------------------------------------------
# What depends on what, in the training pass. Two passes of the same shape are compared bit by bit.


FRAMES = 6


@pytest.fixture(scope="module", params=[(1, 3, 1), (1, 8, 3), (2, 3, 1), (2, 3, 2), (2, 3, 3), (2, 8, 1), (2, 8, 2)],
                ids=lambda p: "copies{}-window{}-kernel{}".format(*p))
def case(request):
    """(network, inputs for six clips, outputs): one and two noised copies, a window within and beyond the clip."""
    copies, window, kernel = request.param
    blocks = 2 if kernel == 1 else 1                        # three attentions alone reach over the whole clip
    denoiser = network(window=window, temporal_kernel=kernel, action_dim=4, blocks_per_level=blocks)
    inputs = training_inputs(denoiser, copies, FRAMES, b=6)
    outputs = denoiser(*inputs)[0]
    assert 0.3 < rms(outputs) < 3
    return denoiser, inputs, outputs


def reached(case, alter, places):
    """{place: {(copy, frame) of the noised frames whose outputs are not bitwise what they were}}, after `alter`
    changed clip i's inputs at the i-th place."""
    denoiser, inputs, before = case
    inputs = [value.clone() for value in inputs]
    for i, place in enumerate(places):
        alter(*(value[i] for value in inputs), place)
    differs = (denoiser(*inputs)[0] != before).flatten(3).any(-1)
    assert not differs[len(places):].any(), "a clip changed that was not altered"
    return {place: {(s + 1, t) for s, t in differs[i].nonzero().tolist()} for i, place in enumerate(places)}


def outputs_from(case, first):
    """{(copy, frame)} of all noised frames from frame `first` on."""
    return {(s, t) for s in range(1, case[1][0].shape[1]) for t in range(first, FRAMES)}


def some_noised(case):
    return [(s, t) for s, t in sorted(outputs_from(case, 0)) if t in (0, 2, FRAMES - 1)]


def test_a_clean_frame_reaches_all_later_outputs_and_no_others(case):
    def alter(x, sigma, actions, t):
        x[CLEAN, t] += 0.5
    assert reached(case, alter, range(FRAMES)) == {t: outputs_from(case, t + 1) for t in range(FRAMES)}


def test_a_clean_frames_noise_level_reaches_all_later_outputs_and_no_others(case):
    def alter(x, sigma, actions, t):
        sigma[CLEAN, t] = 0.1
    assert reached(case, alter, range(FRAMES)) == {t: outputs_from(case, t + 1) for t in range(FRAMES)}


def test_a_noised_frame_reaches_its_own_output_only(case):
    def alter(x, sigma, actions, place):
        x[place] += 0.5
    assert reached(case, alter, some_noised(case)) == {place: {place} for place in some_noised(case)}


def test_a_noised_frames_noise_level_reaches_its_own_output_only(case):
    def alter(x, sigma, actions, place):
        sigma[place] *= 2
    assert reached(case, alter, some_noised(case)) == {place: {place} for place in some_noised(case)}


def test_an_action_reaches_its_own_and_all_later_outputs(case):
    def alter(x, sigma, actions, t):
        actions[t] = (actions[t] + 1) % 4
    assert reached(case, alter, range(FRAMES)) == {t: outputs_from(case, t) for t in range(FRAMES)}


def test_clean_features_depend_on_earlier_frames_and_actions_and_nothing_noised(case):
    """Clip t's clean frame and action t change, and everything noised: clean features t and later change, and no
    others; in the layers that still have the clean copy."""
    denoiser, (x, sigma, actions), _ = case
    before = features(denoiser, x, sigma, actions)
    x, sigma, actions = x.clone(), sigma.clone(), actions.clone()
    x[:, 1:] = torch.randn(x[:, 1:].shape)
    sigma[:, 1:] *= 3
    for t in range(FRAMES):
        x[t, CLEAN, t] += 0.5
        actions[t, t] = (actions[t, t] + 1) % 4
    changed = torch.zeros(FRAMES, FRAMES, dtype=torch.bool)
    for (clean, noised), (new_clean, new_noised) in zip(before, features(denoiser, x, sigma, actions), strict=True):
        if clean is not None:
            changed |= (clean != new_clean).flatten(2).any(-1)
        assert (noised != new_noised).flatten(3).any(-1).all()
    assert torch.equal(changed, torch.ones(FRAMES, FRAMES, dtype=torch.bool).triu())


def test_clean_frames_go_no_further_than_the_last_layer_that_mixes_time():
    denoiser = network()
    x, sigma, _ = training_inputs(denoiser, copies=2)
    (first, last), after = denoiser.unet.middle, denoiser.unet.decoder
    dropped = [clean is None for clean, _ in features(denoiser, x, sigma)]
    assert dropped == [False] * (len(denoiser.unet.encoder) + 1) + [True] * (1 + len(after))
    frames = []
    for block in (first, last, *after):
        block.conv1.register_forward_hook(lambda _, inputs, __: frames.append(len(inputs[0])))
    denoiser.read(x[:, 0], sigma[:, 0], Cache())
    b, t = sigma[:, 0].shape
    assert frames == [b, 0] * t                                         # one frame of each clip after another


@pytest.mark.parametrize("window", [1, 4])
def test_sharpness_multiplies_the_logits_of_each_head(window):
    torch.manual_seed(0)
    layer, x = m.Attention(32, 16, window), torch.randn(2 * 4, 32, 2, 3)
    assert layer.sharpness.tolist() == [1, 1]
    layer.sharpness.data[:] = torch.tensor([0.5, 20])
    q, k, v = m.unit_rms(rearrange(layer.qkv(x), "(b t) (n m d) h w -> n b m 1 t (h w) d", n=3, m=2, t=4), -1)
    expected = dense_attention(rotated(q, 0) * torch.tensor([0.5, 20]).view(2, 1, 1, 1, 1), rotated(k, 0), v, window)
    expected = rearrange(expected, "b m 1 t (h w) d -> (b t) (m d) h w", h=2)
    assert farthest(layer(x, m.Sequence(1, 4)), m.mp_sum(x, layer.out(expected), 0.3)) < 1e-5


@pytest.mark.parametrize("reach", [1, 2, 3, 5])
@pytest.mark.parametrize("make", [attention, causal_conv])
def test_a_single_layer_reads_exactly_what_the_contract_allows(make, reach):
    torch.manual_seed(0)
    layer, (s, t) = make(reach), (3, 5)
    x = torch.randn(1, s, t, 16, 2, 2, requires_grad=True)
    y = through(layer, x)
    for i in range(s):
        for j in range(t):
            gradient, = torch.autograd.grad((y[0, i, j] * torch.randn(16, 2, 2)).sum(), x, retain_graph=True)
            reads = {tuple(at) for at in gradient[0].flatten(2).abs().sum(-1).nonzero().tolist()}
            assert reads == visible(i, j, reach), f"frame {j} of copy {i}"


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_sees_is_the_contract_on_numbers_and_on_tensors(window):
    s, t = 3, 6
    frames = [(i, j) for i in range(s) for j in range(t)]
    expected = torch.tensor([[key in visible(*query, window) for key in frames] for query in frames])
    assert [[bool(m.sees(*query, *key, window)) for key in frames] for query in frames] == expected.tolist()
    at = torch.tensor(frames)
    q, k = at[:, None], at[None]
    assert torch.equal(m.sees(q[..., 0], q[..., 1], k[..., 0], k[..., 1], window), expected)


def test_repeating_the_clip_as_another_copy_repeats_its_outputs():
    denoiser = network()
    x, sigma, _ = training_inputs(denoiser)
    once = denoiser(x, sigma)[0]
    twice = denoiser(torch.cat([x, x[:, 1:]], 1), torch.cat([sigma, sigma[:, 1:]], 1))[0]
    assert farthest(twice[:, 0], twice[:, 1]) < 1e-5
    assert farthest(twice[:, :1], once) < 1e-5


# ------------------------------------------------------------------------------------------------
# The training pass is the incremental pass, frame by frame.


def assert_same_frames(found, expected, tolerance=2e-5):
    """found: {t: b r c h w}; expected: b r t c h w, non-trivial."""
    assert 0.3 < rms(expected) < 3
    assert found
    for t, frame in found.items():
        assert farthest(frame, expected[:, :, t]) < tolerance, f"frame {t}"


@pytest.mark.parametrize("window", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_the_training_pass_is_the_incremental_pass_beyond_two_windows(kernel, window):
    """With one copy and without actions, and, at every other turn, with two copies and with actions."""
    copies, action_dim = ((1, 0), (2, 3))[(kernel + window) % 2]
    denoiser = network(temporal_kernel=kernel, window=window, action_dim=action_dim)
    inputs = training_inputs(denoiser, copies, frames=2 * window + 3)
    found = frame_by_frame(denoiser, *inputs)
    assert len(found) == 2 * window + 3
    assert_same_frames(found, denoiser(*inputs)[0])


@pytest.mark.parametrize("changes", [
    {"frame_shape": (2, 8, 12), "patch_size": 2, "channel_mults": (1, 2), "video_attn_resolutions": (2, 4),
     "frame_attn_resolutions": ()},
    {"channel_mults": (1,), "video_attn_resolutions": (8,), "frame_attn_resolutions": (), "blocks_per_level": 2},
    {"video_attn_resolutions": (), "temporal_kernel": 4},
    {"channel_mults": (1, 2, 2), "video_attn_resolutions": (4, 2), "head_dim": 8, "temporal_kernel": 3},
], ids=["oblong-patches", "one-level", "convolutions-only", "three-levels"])
def test_the_training_pass_is_the_incremental_pass_for_other_networks(changes):
    denoiser = network(**changes)
    inputs = training_inputs(denoiser, 2, frames=8)
    assert_same_frames(frame_by_frame(denoiser, *inputs), denoiser(*inputs)[0])


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("chunks", [[9], [1, 8], [2, 1, 3, 3], [4, 4]], ids=str)
def test_the_context_may_be_read_in_chunks_of_any_length(chunks, kernel):
    denoiser = network(window=3, temporal_kernel=kernel, action_dim=2)
    inputs = training_inputs(denoiser, 1, frames=10)
    assert_same_frames(frame_by_frame(denoiser, *inputs, chunks=chunks), denoiser(*inputs)[0])


def test_what_depends_on_the_position_alone_is_computed_once_for_all_passes_on_a_frame():
    cache, made = Cache(), []

    def square(positions, factor):
        made.append(positions.item())
        return factor * positions ** 2
    for frame in range(3):
        for _ in range(2):
            assert m.Sequence(cache=cache).position_table(square, "cpu", 5) == 5 * frame ** 2
        cache.advance()
    assert made == [0, 1, 2, 3]


def test_a_context_with_a_noise_level_is_read_as_in_training():
    denoiser = network()
    x, sigma, _ = training_inputs(denoiser, frames=7)
    plain = denoiser(x, sigma)[0]
    sigma[:, CLEAN] = torch.rand(2, 1).expand(2, 7)
    expected = denoiser(x, sigma)[0]
    assert farthest(plain, expected) > 1e-2
    assert_same_frames(frame_by_frame(denoiser, x, sigma), expected)


def test_denoising_leaves_no_trace():
    denoiser = network(temporal_kernel=3)
    x, sigma, _ = training_inputs(denoiser, frames=8)
    expected = frame_by_frame(denoiser, x, sigma)
    cache = Cache()
    for t in range(8):
        now = slice(t, t + 1)
        for _ in range(2):                                              # again, after the garbage: bitwise the same
            assert torch.equal(denoiser.step(x[:, 1, now], sigma[:, 1, now], cache), expected[t])
            denoiser.step(100 * torch.randn_like(x[:, 1, now]), torch.full((2, 1), 80.0), cache)
        assert cache.position == t
        denoiser.read(x[:, 0, now], sigma[:, 0, now], cache)


def test_two_interleaved_rollouts_do_not_mix():
    denoiser = network(temporal_kernel=3)
    clips = [training_inputs(denoiser, frames=7, seed=seed)[:2] for seed in (1, 2)]
    alone = [frame_by_frame(denoiser, *clip) for clip in clips]
    caches = Cache(), Cache()
    for t in range(7):
        now = slice(t, t + 1)
        for (x, sigma), cache, expected in zip(clips, caches, alone):
            assert torch.equal(denoiser.step(x[:, 1, now], sigma[:, 1, now], cache), expected[t])
            denoiser.read(x[:, 0, now], sigma[:, 0, now], cache)
    assert farthest(alone[0][6], alone[1][6]) > 0.1


def test_a_copied_cache_goes_on_by_itself_from_the_same_past():
    denoiser = network(temporal_kernel=3)
    x, sigma, _ = training_inputs(denoiser, frames=7)
    expected, cache = frame_by_frame(denoiser, x, sigma), Cache()
    denoiser.read(x[:, 0, :3], sigma[:, 0, :3], cache)
    denoiser.step(x[:, 1, 3:4], sigma[:, 1, 3:4], cache)
    branch = copy.deepcopy(cache)
    denoiser.read(torch.randn_like(x[:, 0, :2]), sigma[:, 0, :2], cache)                # the other one goes elsewhere
    for t in range(3, 7):
        assert farthest(denoiser.step(x[:, 1, t:t + 1], sigma[:, 1, t:t + 1], branch), expected[t]) < 3e-6
        denoiser.read(x[:, 0, t:t + 1], sigma[:, 0, t:t + 1], branch)
    assert cache.position == 5 and branch.position == 7


def test_rotations_are_whole_turns_a_period_from_a_radian_a_frame_down_in_equal_ratios():
    cos, sin = m.rotation(torch.tensor([1]), 16, torch.float64)[:, 0, 0]
    turns = torch.atan2(sin, cos) * m.ROTARY_PERIOD / (2 * math.pi)     # a period
    assert farthest(turns, turns.round()) < 1e-3
    ideal = torch.logspace(math.log10(m.ROTARY_PERIOD / (2 * math.pi)), 0, 17)[:16]
    assert farthest(turns, ideal.round()) < 1e-3


def test_a_rotation_in_time_repeats_after_a_period_exactly():
    q = torch.randn(1, 2, 1, 5, 3, 16)
    assert torch.equal(rotated(q, 7), rotated(q, 7 + m.ROTARY_PERIOD))
    assert torch.equal(rotated(q, m.ROTARY_PERIOD - 2)[..., 2:, :, :],
                       rotated(q, 0 - 2 + m.ROTARY_PERIOD * 3)[..., 2:, :, :])
    assert farthest(rotated(q, 7), rotated(q, 8)) > 0.1


def test_rotated_products_depend_on_the_distance_in_time_only():
    q, k = torch.randn(2, 1, 1, 1, 1, 1, 16)
    products = {}
    for start in (0, 5, m.ROTARY_PERIOD - 4, m.ROTARY_PERIOD - 1, 3 * m.ROTARY_PERIOD - 2):
        products[start] = torch.stack([(rotated(q, start + distance) * rotated(k, start)).sum()
                                       for distance in range(8)])
    for product in products.values():
        assert farthest(product, products[0]) < 1e-5
    assert products[0][0].item() == pytest.approx((q * k).sum().item(), abs=1e-5)
    assert products[0].diff().abs().min() > 1e-3


@pytest.mark.parametrize("start", [1000 * 3, m.ROTARY_PERIOD - 5, 5 * m.ROTARY_PERIOD - 7], ids=str)
def test_a_rollout_past_the_rotary_period_goes_on_as_any_other(start):
    """Two frames a layer, five layers that mix time: after five frames nothing of the start is left."""
    denoiser = network(channel_mults=(1,), video_attn_resolutions=(8,), frame_attn_resolutions=(), window=2)
    x, sigma, _ = training_inputs(denoiser, frames=15)
    late = Cache()
    late.advance(start)
    found = frame_by_frame(denoiser, x, sigma, cache=late)
    assert late.position == start + 14
    assert_same_frames({t: found[t] for t in range(5, 15)}, denoiser(x, sigma)[0])


# ------------------------------------------------------------------------------------------------
# Video attention: all its paths are one masked softmax.


SHAPES = [(2, 5, 6), (3, 4, 6), (4, 5, 3), (2, 8, 16)]                  # copies, frames, positions; 2 8 16: 256


@pytest.mark.parametrize("window", [1, 3, "all"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2 * m.FRAMES_AT_ONCE + 7, 2)], ids=str)
def test_attention_frame_by_frame_is_the_dense_softmax_with_its_gradients(shape, window):
    window = shape[1] if window == "all" else window
    qkv = attention_inputs(*shape)
    found, expected = m.attend_frame_by_frame(*qkv, window), dense_attention(*qkv, window)
    assert farthest(found, expected) < 1e-5
    assert rms(expected) > 0.1
    for grad, expected_grad in zip(gradients(found, qkv), gradients(expected, qkv), strict=True):
        assert farthest(grad, expected_grad) < 1e-5
        assert rms(expected_grad) > 0.01


@pytest.mark.parametrize("window", [1, 3, "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_flex_attention_is_the_dense_softmax(monkeypatch, shape, window):
    monkeypatch.setattr(m, "compiled_flex_attention", lambda: m.flex_attention)
    window = shape[1] if window == "all" else window
    qkv = attention_inputs(*shape)
    with torch.no_grad():
        found = m.attend_flex(*qkv, m.block_mask(*shape, window, qkv[0].device))
        assert farthest(found, dense_attention(*qkv, window)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_flex_attention_is_compiled_for_every_shape(monkeypatch):
    """torch gives up after eight, and would build the full score matrix for the others."""
    graphs, compile_with = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_with(
        function, backend=lambda graph, _: graphs.append(graph) or graph, **how))
    torch._dynamo.reset()
    m.compiled_flex_attention.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=8), torch.no_grad():
        for frames in range(1, 11):
            m.attend_flex(*attention_inputs(2, frames, 3), m.block_mask(2, frames, 3, 2, torch.device("cpu")))
    m.compiled_flex_attention.cache_clear()
    assert len(graphs) == 10


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_a_network_with_the_masks_of_a_gpu_computes_the_same():
    """Attention at two resolutions of frames that are no squares. Its UNet, compiled, makes no mask of its own, and
    is one graph, in which `recompute` allows layers to keep nothing for later ones."""
    graphs = []
    denoiser = network(frame_shape=(1, 8, 16), video_attn_resolutions=(8, 4), frame_attn_resolutions=(),
                       recompute=True).requires_grad_(False)            # there is no FlexAttention backward on a CPU
    x, sigma, _ = training_inputs(denoiser, copies=2)
    expected = denoiser(x, sigma)[0]
    torch._dynamo.reset()
    denoiser.unet.compile(backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, dynamic=False)
    for _ in range(2):
        seq = m.Sequence(3, x.shape[2])
        seq.masks = denoiser.block_masks(seq, x.device)
        assert farthest(denoiser.denoise(x, sigma, None, seq), expected) < 1e-5
    (graph,) = graphs
    code = "".join(part.code for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
    assert code.count("flex_attention") >= 5 and "checkpoint" in code
    assert "argsort" not in code                                        # which sorts the blocks of a mask


@pytest.mark.parametrize("window", [2, 3, 4])
def test_cached_attention_is_the_dense_softmax_over_several_windows(window):
    q, k, v = (x.detach() for x in attention_inputs(1, 10, p=6))
    layer, cache, found = attention(window), Cache(), []
    layer.number = 0                                        # that a Denoiser gives its layers
    for frame in torch.stack([q, k, v]).split(1, dim=4):
        found.append(layer.attend(frame, m.Sequence(cache=cache, commit=True)))
        cache.advance()
    assert farthest(torch.cat(found, dim=3), dense_attention(rotated(q, 0), rotated(k, 0), v, window)) < 1e-5


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 9, 16), (4, 7, 35), (2, 8, 16)], ids=str)
def test_compiled_flex_attention_is_the_dense_softmax_with_its_gradients(shape, dtype, tolerance):
    for window in (1, 3, shape[1]):
        qkv = attention_inputs(*shape, d=32, device="cuda", dtype=dtype)
        exact = [x.detach().float().requires_grad_() for x in qkv]
        mask = m.block_mask(*shape, window, qkv[0].device)
        found, expected = m.attend_flex(*qkv, mask), dense_attention(*exact, window)
        assert rms(found - expected) < tolerance * rms(expected)
        for grad, expected_grad in zip(gradients(found, qkv), gradients(expected, exact), strict=True):
            for ours, dense in zip(grad.unbind(2), expected_grad.unbind(2), strict=True):         # copy by copy: a
                assert rms(ours - dense) < tolerance * rms(dense)                                   # wrong one shows


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:.*flex_attention called without torch.compile")
def test_a_gpu_computes_what_the_cpu_computes():
    denoiser = network(action_dim=3)
    inputs = training_inputs(denoiser, 2, frames=8)
    expected = denoiser(*inputs)[0]
    denoiser, inputs = denoiser.cuda(), [value.cuda() for value in inputs]
    assert_same_frames({t: frame.cpu() for t, frame in frame_by_frame(denoiser, *inputs).items()}, expected, 1e-2)
    assert_same_frames(dict(enumerate(denoiser(*inputs)[0].cpu().unbind(2))), expected, 1e-2)


# ------------------------------------------------------------------------------------------------
# Magnitude.


@pytest.mark.parametrize("changes", [
    {},
    {"temporal_kernel": 3, "blocks_per_level": 2},
    {"frame_shape": (3, 64, 64), "channels": 16, "channel_mults": (1, 2, 2), "patch_size": 2, "head_dim": 16,
     "video_attn_resolutions": (16, 8)},
], ids=["default", "kernel3-2blocks", "64x64"])
def test_every_block_keeps_the_magnitude_at_initialisation_at_every_frame(changes):
    """In the mean square over six networks: one narrow network's weights alone move a block by ten percent."""
    squares = []
    for seed in range(6):
        torch.manual_seed(seed)
        denoiser = Denoiser(ModelConfig(**changes)).requires_grad_(False)
        sigma = torch.randn(2, 2, 6).exp()
        sigma[:, CLEAN] = 0
        size = (sigma ** 2 + denoiser.cfg.sigma_data ** 2).sqrt()[..., None, None, None]
        x = size * torch.randn(2, 2, 6, *denoiser.cfg.frame_shape)
        squares.append([rms(noised if clean is None else torch.cat([clean[:, None], noised], 1), keep=[1, 2]) ** 2
                        for clean, noised in features(denoiser, x, sigma)])
    for block in zip(*squares, strict=True):
        found = torch.stack(block).mean(0).sqrt()                       # copy, frame
        assert 0.8 < found.min() and found.max() < 1.25, found


def test_an_encoder_block_normalises_every_pixel_of_its_trunk_over_the_channels():
    block = network().unet.encoder[0]
    block.attention, block.conv1.weight.data[:] = None, 0               # the trunk alone
    x = torch.randn(6, 16, 8, 8) * torch.randn(6, 1, 8, 8).exp()
    found = block(x, torch.zeros(6, 32), m.Sequence(2, 3))
    assert farthest(rms(found, keep=[0, 2, 3]), torch.full((6, 8, 8), m.TRUNK)) < 1e-5
    assert farthest(found / m.TRUNK, x / rms(x, keep=[0, 2, 3])[:, None]) < 1e-5


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_a_missing_past_does_not_shrink_a_causal_convolution(kernel):
    torch.manual_seed(0)
    found = rms(through(causal_conv(kernel, 64), torch.randn(8, 2, 6, 64, 6, 6)), keep=[1, 2])
    assert found.shape == (2, 6)
    assert (found - 1).abs().max() < 0.05, found


# ------------------------------------------------------------------------------------------------
# One frame: the image network.


def test_a_single_frame_is_what_a_step_with_an_empty_cache_gives():
    denoiser = network(temporal_kernel=1)
    x, sigma, _ = training_inputs(denoiser, frames=1)
    expected = denoiser(x, sigma)[0]
    assert farthest(denoiser.step(x[:, 1], sigma[:, 1], Cache()), expected[:, 0]) < 3e-6
    x[:, CLEAN], sigma[:, CLEAN] = 3, 1                                 # there is no frame that would read it
    assert torch.equal(denoiser(x, sigma)[0], expected)


@pytest.mark.parametrize("kernel", [1, 2])
def test_a_first_frame_is_processed_alike_as_clean_and_as_noised(kernel):
    denoiser = network(temporal_kernel=kernel)
    x, sigma, _ = training_inputs(denoiser, copies=2, frames=1)
    x, sigma = x[:, 1:2].expand_as(x), sigma[:, 1:2].expand_as(sigma)
    for clean, noised in features(denoiser, x, sigma):
        assert rms(noised) > 0.3
        assert farthest(noised[:, 0], noised[:, 1]) < 1e-6
        assert clean is None or farthest(clean, noised[:, 0]) < 1e-6
    found = denoiser(x, sigma)[0]
    assert farthest(found[:, 0], found[:, 1]) < 1e-6


def test_without_a_view_of_the_past_every_frame_is_an_image():
    denoiser = network(temporal_kernel=1, window=1)
    x, sigma, _ = training_inputs(denoiser, copies=2, frames=5)
    images = denoiser(x.permute(0, 2, 1, 3, 4, 5).flatten(0, 1)[:, :, None], sigma.mT.flatten(0, 1)[:, :, None])[0]
    assert farthest(denoiser(x, sigma)[0].transpose(1, 2).flatten(0, 1), images[:, :, 0]) < 1e-6


# ------------------------------------------------------------------------------------------------
# Magnitude-preserving operations: unit variance in, unit variance out, each with its defining property.


def test_mp_silu_is_silu_at_unit_variance():
    torch.manual_seed(0)
    x = torch.randn(1_000_000)
    assert rms(m.mp_silu(x)).item() == pytest.approx(1, rel=0.005)
    assert farthest(m.mp_silu(x) / m.mp_silu(torch.ones(1)), F.silu(x) / F.silu(torch.ones(1))) < 1e-5


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_mp_sum_blends_in_proportion_t_at_unit_variance(t):
    torch.manual_seed(0)
    a, b = torch.randn(2, 1_000_000)
    y = m.mp_sum(a, b, t)
    assert rms(y).item() == pytest.approx(1, rel=0.005)
    part_a, part_b = (y * a).mean().item(), (y * b).mean().item()
    assert part_b * (1 - t) == pytest.approx(part_a * t, abs=0.005)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("n_a, n_b", [(8, 8), (4, 32), (48, 16)])
def test_mp_cat_weighs_both_parts_by_t_whatever_their_size(n_a, n_b, t):
    torch.manual_seed(0)
    a, b = torch.randn(16, n_a, 40, 40), torch.randn(16, n_b, 40, 40)
    y = m.mp_cat(a, b, t)
    assert y.shape[1] == n_a + n_b
    assert rms(y).item() == pytest.approx(1, rel=0.01)
    from_a, from_b = y[:, :n_a].norm().item(), y[:, n_a:].norm().item()     # what a random weight makes of each
    assert from_b / from_a == pytest.approx(t / (1 - t), rel=0.01)
    assert farthest(y[:, :n_a] / y[0, 0, 0, 0], a / a[0, 0, 0, 0]) < 1e-3


def test_mp_cat_by_default_weighs_both_parts_alike():
    a, b = torch.randn(1, 4, 3, 3), torch.randn(1, 8, 3, 3)
    assert torch.equal(m.mp_cat(a, b), m.mp_cat(a, b, 0.5))


@pytest.mark.parametrize("inputs", [1, 2])
def test_fourier_features_have_unit_variance_and_tell_inputs_apart(inputs):
    torch.manual_seed(0)
    features = m.MPFourier(1024, inputs)
    y = features(torch.randn(1000, inputs))
    assert y.shape == (1000, 1024)
    assert rms(y).item() == pytest.approx(1, rel=0.01)
    assert rms(features(torch.zeros(1, inputs))).item() == pytest.approx(1, rel=0.1)
    for i in range(inputs):
        step = torch.zeros(1, inputs)
        step[0, i] = 1
        assert abs((features(step) * features(torch.zeros(1, inputs))).mean()) < 0.15
        alike = (features(step / 5) * features(torch.zeros(1, inputs))).mean().item()
        assert alike == pytest.approx(math.exp(-2 * (math.pi / 5) ** 2), abs=0.1)       # of frequencies N(0, 1)


def test_a_linear_layer_keeps_unit_variance():
    torch.manual_seed(0)
    y = m.MPLinear(512, 100)(torch.randn(1000, 100))
    assert y.shape == (1000, 512)
    assert rms(y).item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (16, 16)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_a_convolution_keeps_unit_variance_on_maps_of_any_size(k, size):
    torch.manual_seed(0)
    y = m.MPConv(256, 128, k, k)(torch.randn(64, 128, *size))
    assert y.shape == (64, 256, *size)
    assert rms(y).item() == pytest.approx(1, rel=0.03)


def test_unit_rms_divides_by_the_root_mean_square():
    x = 7 * torch.randn(3, 5, 4)
    assert farthest(m.unit_rms(x, (1, 2)), x / rms(x, keep=[0])[:, None, None]) < 1e-5
    assert m.unit_rms(x.bfloat16(), 1).dtype == torch.bfloat16
    assert torch.equal(m.unit_rms(torch.zeros(2, 3), 1), torch.zeros(2, 3))


def test_unit_rms_measures_in_float32_and_keeps_no_float32_copy():
    x = (100 + torch.rand(4, 1024)).bfloat16().requires_grad_()         # squares of 8 bits would sum up wrongly
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        y = m.unit_rms(x, 1)
    assert rms(y.float()).item() == pytest.approx(1, abs=2e-3)
    assert {saved.dtype for saved in kept if saved.numel() == x.numel()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------
# Weights on the sphere.


def weight_vectors(denoiser):
    """The magnitude-preserving weights, name: rows x fan in."""
    return {f"{name}.weight": module.weight.flatten(1) for name, module in denoiser.named_modules()
            if isinstance(module, m.MPWeight)}


def test_every_weight_is_on_the_sphere_and_comes_back_to_it():
    denoiser = network(temporal_kernel=3, action_dim=3)
    x, sigma, actions = training_inputs(denoiser)
    expected = denoiser(x, sigma, actions)
    vectors = weight_vectors(denoiser)
    assert {name for name, p in denoiser.named_parameters() if p.ndim > 1} == set(vectors)
    for vector in vectors.values():
        assert (rms(vector, keep=[0]) - 1).abs().max() < 1e-5
        vector *= torch.rand(len(vector), 1) + 0.5                      # a view: the weight itself grows
    assert farthest(denoiser(x, sigma, actions)[0], expected[0]) > 0.01
    denoiser.normalize_weights()
    for found, wanted in zip(denoiser(x, sigma, actions), expected, strict=True):
        assert farthest(found, wanted) < 1e-5


def sphere(w):
    return w / w.flatten(1).norm(dim=1).view(-1, *[1] * (w.ndim - 1)) * math.sqrt(w[0].numel())


def test_a_frozen_weight_is_scaled_once_and_anew_after_it_was_written_to():
    layer = m.MPConv(4, 3, 3, 3).requires_grad_(False)
    first = layer.scaled(torch.float32, 2.0)
    assert layer.scaled(torch.float32, 2.0) is first
    assert torch.equal(layer.scaled(torch.float32, 1.0) * 2, first)
    assert layer.scaled(torch.float64, 2.0).dtype == torch.float64
    layer.load_state_dict({"weight": -layer.weight})
    assert torch.equal(layer.scaled(torch.float32, 2.0), -first)
    layer.weight.mul_(3)
    assert torch.allclose(layer.scaled(torch.float32, 2.0), -3 * first)


def test_weights_that_a_loss_does_not_reach_are_left_alone():
    """A hand-written one, say, that has no use for the log-variance."""
    denoiser = network().requires_grad_(True)
    denoiser(*training_inputs(denoiser)[:2])[0].square().mean().backward()
    denoiser.project_gradients()
    assert denoiser.error_log_variance.weight.grad is None
    weight = denoiser.unet.stem.weight
    assert (weight * weight.grad).mean((1, 2, 3)).abs().max() < 1e-6 < weight.grad.abs().max()


@pytest.mark.parametrize("times", range(6))
def test_a_copied_model_acts_with_its_own_weights(times):
    """A copy's versions are counted anew, and at some time are those of the model that it was copied from."""
    x, sigma = torch.randn(1, 1, 1, 8, 8), torch.ones(1, 1)
    model, other = (network().requires_grad_(False) for _ in range(2))
    torch.nn.init.normal_(other.unet.stem.weight)
    first = model.step(x, sigma, m.Cache())
    copied = copy.deepcopy(model)
    for _ in range(times):
        copied.load_state_dict(other.state_dict())
    expected = other.step(x, sigma, m.Cache()) if times else first
    assert torch.equal(copied.step(x, sigma, m.Cache()), expected)
    copied.unet.stem.weight.data = 2 * other.unet.stem.weight
    assert not torch.equal(copied.step(x, sigma, m.Cache()), expected)
    assert torch.equal(model.step(x, sigma, m.Cache()), first)


def test_projected_gradients_are_those_through_explicit_normalisation():
    """Every linear layer, convolution and causal convolution of a network, and its gains, which are no weights."""
    denoiser = network(temporal_kernel=3, action_dim=3).requires_grad_()
    inputs = training_inputs(denoiser, 2)
    vectors = weight_vectors(denoiser)

    def loss(outputs):
        return outputs[0].square().mean() + (outputs[1] + 1).square().mean()

    raw = {name: p.detach().clone().requires_grad_() for name, p in denoiser.named_parameters()}
    on_sphere = {name: sphere(p) if name in vectors else p for name, p in raw.items()}
    loss(torch.func.functional_call(denoiser, on_sphere, inputs)).backward()
    loss(denoiser(*inputs)).backward()
    unprojected = {name: p.grad.clone() for name, p in denoiser.named_parameters()}
    denoiser.project_gradients()
    for name, p in denoiser.named_parameters():
        size = raw[name].grad.norm()
        assert size > 1e-5, name
        assert (p.grad - raw[name].grad).norm() < 1e-3 * size, name
        if name not in vectors:
            assert torch.equal(p.grad, unprojected[name]), name
    kinds = {type(module) for module in denoiser.modules() if isinstance(module, m.MPWeight)}
    assert kinds == {m.MPLinear, m.MPConv, m.CausalConv, m.PastSkip}
    assert max((unprojected[name] - p.grad).norm() / p.grad.norm() for name, p in denoiser.named_parameters()) > 0.01


@pytest.mark.parametrize("copies", [1, 2])
def test_channels_are_last_in_memory_from_end_to_end_forward_and_backward(copies):
    """A convolution that meets another layout copies its input first: that costs a fifth of a step."""
    denoiser, kept = network(frame_attn_resolutions=()).requires_grad_(True), {}

    def look(name):
        def keep(_, __, out):
            if out.ndim == 4 and min(out.shape[1:]) > 1:
                kept[name] = out.is_contiguous(memory_format=torch.channels_last)
                out.register_hook(lambda grad: kept.update({f"gradient of {name}": grad.stride(1) == 1}))
        return keep
    for name, module in denoiser.unet.named_modules():
        module.register_forward_hook(look(name))
    denoised, _ = denoiser(*training_inputs(denoiser, copies))
    denoised.square().mean().backward()
    assert len(kept) > 80 and {name for name, last in kept.items() if not last} == set()


# ------------------------------------------------------------------------------------------------
# The causal convolution, against a 3D convolution over each frame's own past.


def plain_causal_conv(weight, x, scale):
    """x: b s t i h w; weight o k i 3 3 (the present first); every frame after the clean frames before it, one at a
    time, with conv3d. What of the taps is missing before the clip and beyond the edges is given back in RMS."""
    (b, s, t, _, h, w), (o, k) = x.shape, weight.shape[:2]
    kernel = weight.flip(1).transpose(1, 2) / math.sqrt(weight[0].numel())                  # o i k 3 3, oldest first
    taps_inside = F.conv2d(torch.ones(1, 1, h, w), torch.ones(1, 1, 3, 3), padding=1).mean()
    y = x.new_zeros(b, s, t, o, h, w)
    for i in range(s):
        for j in range(t):
            frames = torch.cat([x[:, CLEAN, :j], x[:, i, j:j + 1]], dim=1).transpose(1, 2)
            frames = F.pad(frames, (0, 0, 0, 0, k - 1, 0))[:, :, -k:]
            gain = math.sqrt(k / min(j + 1, k) * 9 / taps_inside)
            y[:, i, j] = F.conv3d(frames, kernel, padding=(0, 1, 1))[:, :, 0] * gain
    return y * scale[..., None, None]


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_a_causal_convolution_is_a_convolution_over_each_frames_own_past(frames, kernel):
    torch.manual_seed(0)
    layer = m.CausalConv(6, 5, kernel)
    x = torch.randn(2, 3, frames, 6, 4, 5, requires_grad=True)
    scale = torch.randn(2, 3, frames, 5, requires_grad=True)
    found, expected = through(layer, x, scale), plain_causal_conv(layer.weight, x, scale)
    assert farthest(found, expected) < 1e-5
    inputs = (layer.weight, x, scale)
    for grad, expected_grad in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert farthest(grad, expected_grad) < 2e-5
        assert rms(expected_grad) > 0.1


def plain_past_skip(weight, x):
    """x: b s t c h w; weight c k-1 c 1 1 (the frame before first): every noised frame and, mixed, the clean ones before
    it, which have half of the variance when all are there, and an equal part of that half each."""
    (b, s, t, c, h, w), reach = x.shape, weight.shape[1]
    y = x.new_zeros(b, s - 1, t, c, h, w)
    for j in range(t):
        past = x.new_zeros(b, c, h, w)
        for back in range(1, min(j, reach) + 1):
            past = past + torch.einsum("oi,bihw->bohw", weight[:, back - 1, :, 0, 0], x[:, CLEAN, j - back])
        share = min(j, reach) / reach / 2
        y[:, :, j] = math.sqrt(1 - share) * x[:, 1:, j] + past[:, None] / math.sqrt(2 * reach * c)
    return y


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("frames", [2, 5])
def test_a_skip_adds_to_each_noised_frame_the_clean_ones_before_it(frames, kernel):
    torch.manual_seed(0)
    layer, x = m.PastSkip(6, kernel), torch.randn(2, 3, frames, 6, 4, 5, requires_grad=True)
    found = layer(x.flatten(0, 2), m.Sequence(3, frames)).unflatten(0, (2, 2, frames))
    expected = plain_past_skip(layer.weight, x)
    assert farthest(found, expected) < 1e-5
    inputs = (layer.weight, x)
    for grad, expected_grad in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert farthest(grad, expected_grad) < 2e-5
        assert rms(expected_grad) > 0.1


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_a_missing_past_does_not_shrink_a_skip(kernel):
    torch.manual_seed(0)
    x = torch.randn(8 * 2 * 6, 64, 6, 6)
    found = rms(m.PastSkip(64, kernel)(x, m.Sequence(2, 6)).unflatten(0, (8, 6)), keep=[1])
    assert found.shape == (6,) and (found - 1).abs().max() < 0.05, found


def test_each_level_has_the_attention_it_is_given_and_time_is_mixed_before_the_decoder():
    """Attention over the past before the decoder, within a frame in it; or within a frame alone; or none. Each block's
    first convolution sees the clean frames before, unless it is the decoder's."""
    denoiser, attention, kernels = network(frame_shape=(1, 16, 16), channel_mults=(1, 1, 1), window=5), {}, {}
    for part in ("encoder", "middle", "decoder"):
        blocks, heights = getattr(denoiser.unet, part), attention.setdefault(part, set())
        kernels[part] = {block.conv0.kernel for block in blocks}
        for layer in (block.attention for block in blocks if block.attention):
            layer.register_forward_hook(
                lambda layer, inputs, _, heights=heights: heights.add((inputs[0].shape[2], layer.window)))
    denoiser(*training_inputs(denoiser, frames=2)[:2])
    assert attention == {"encoder": {(8, 1), (4, 5)}, "middle": {(4, 5)}, "decoder": {(4, 1), (8, 1)}}
    assert kernels == {"encoder": {2}, "middle": {2}, "decoder": {1}}


def test_recomputing_in_the_backward_pass_saves_memory_and_changes_nothing():
    def step(recompute):
        denoiser = network(dropout=0.3, recompute=recompute)
        denoiser.requires_grad_().train()
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        inputs = training_inputs(denoiser, 2)
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, u = denoiser(*inputs)
        (out.square().mean() + u.mean()).backward()
        return out, [p.grad for p in denoiser.parameters()], sum(kept.values())
    out, gradients, kept = step(False)
    again, same_gradients, fewer = step(True)
    assert torch.equal(out, again) and fewer < 0.6 * kept
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))


# ------------------------------------------------------------------------------------------------
# The denoiser: EDM's preconditioning, actions, log-variance, precision.


def edm(sigma, sd):
    """EDM Table 1, in float64."""
    sigma = sigma.double()[..., None, None, None]
    c_skip = sd ** 2 / (sigma ** 2 + sd ** 2)
    c_out = sigma * sd / torch.sqrt(sd ** 2 + sigma ** 2)
    c_in = 1 / torch.sqrt(sigma ** 2 + sd ** 2)
    return c_skip, c_out, c_in


def replace_network_output(denoiser, make):
    """From here on the UNet's output is make(its input, its output)."""
    denoiser.unet.register_forward_hook(lambda _, inputs, out: make(inputs[0], out))


@pytest.mark.parametrize("sd", [0.5, 1.7])
def test_the_output_is_edms_combination_of_input_and_network_output(sd):
    denoiser = network(sigma_data=sd)
    x, sigma, _ = training_inputs(denoiser, copies=2)
    replace_network_output(denoiser, lambda _, out: torch.full_like(out, 3.0))
    c_skip, c_out, _ = edm(sigma[:, 1:], sd)
    assert farthest(denoiser(x, sigma)[0], c_skip * x[:, 1:] + c_out * 3) < 1e-5


def test_the_network_is_given_the_scaled_frame_in_patches_and_gives_it_back_in_place():
    denoiser = network(frame_shape=(2, 8, 12), patch_size=2, sigma_data=0.6, frame_attn_resolutions=())
    x, sigma, _ = training_inputs(denoiser, frames=1)
    x, sigma = x[:, 1], sigma[:, 1]
    given = []
    replace_network_output(denoiser, lambda folded, _: given.append(folded) or folded)
    found = denoiser.step(x, sigma, Cache())
    c_skip, c_out, c_in = edm(sigma, 0.6)
    assert farthest(given[0], F.pixel_unshuffle((x * c_in)[:, 0], 2)) < 1e-5
    assert farthest(found, c_skip * x + c_out * c_in * x) < 1e-5


def test_the_network_is_told_a_quarter_of_the_log_noise_level_and_a_clean_frames_is_finite():
    denoiser = network()
    x, sigma, _ = training_inputs(denoiser)
    told = []
    denoiser.noise_features.register_forward_pre_hook(lambda _, inputs: told.append(inputs[0]))
    denoiser(x, sigma)
    expected = sigma.clamp(min=m.CLEAN_SIGMA).double().log() / 4
    assert 0 < m.CLEAN_SIGMA < 0.01
    assert farthest(told[0][..., 0], expected) < 1e-5


def test_at_no_noise_a_frame_is_its_own_estimate():
    denoiser = network()
    x, sigma, _ = training_inputs(denoiser)
    x = x[:, :1].repeat(1, 2, 1, 1, 1, 1)
    sigma[:, 1:] = 1e-6
    assert farthest(denoiser(x, sigma)[0], x[:, 1:]) < 1e-4
    sigma[:, 1:] = 1
    assert farthest(denoiser(x, sigma)[0], x[:, 1:]) > 0.1


def test_under_any_noise_the_estimate_is_of_the_datas_size():
    denoiser = network()
    x, sigma, _ = training_inputs(denoiser)
    sigma[:, 1:] = 1e6
    x[:, 1:] = 1e6 * torch.randn_like(x[:, 1:])
    assert 0.3 < rms(denoiser(x, sigma)[0]) < 3
    denoiser.unet.head_gain.zero_()
    expected = x[:, 1:].double() * 0.8 ** 2 / (1e12 + 0.8 ** 2)
    assert rms(expected) < 1e-6
    assert farthest(denoiser(x, sigma)[0], expected) < 1e-11


def test_an_untrained_network_returns_the_frame_shrunk_by_c_skip():
    torch.manual_seed(0)
    denoiser = Denoiser(ModelConfig())
    x, sigma, _ = training_inputs(denoiser)
    assert farthest(denoiser(x, sigma)[0], edm(sigma[:, 1:], 0.5)[0] * x[:, 1:]) < 1e-6


@pytest.mark.parametrize("unknown", [-1, math.nan])
def test_of_an_unknown_action_a_frame_is_told_nothing(unknown):
    """Whatever the weights of the actions are, and it is not the same as any known action, nor as zeros."""
    denoiser = network(action_dim=3)
    x, sigma, actions = training_inputs(denoiser)
    hidden = torch.full((*actions.shape, 3), unknown) if math.isnan(unknown) else torch.full_like(actions, unknown)
    before = denoiser(x, sigma, hidden)[0]
    zeros = denoiser(x, sigma, torch.zeros(*actions.shape, 3))[0]
    assert before.isfinite().all() and farthest(before, zeros) > 1e-3
    assert all(farthest(before, denoiser(x, sigma, torch.full_like(actions, a))[0]) > 1e-3 for a in range(3))
    with torch.no_grad():
        denoiser.action_emb.weight.neg_()
    assert torch.equal(before, denoiser(x, sigma, hidden)[0])
    one = actions.clone()
    one[:, 2] = -1                                          # an unknown one among known ones
    known = denoiser(x, sigma, actions)[0]
    some = denoiser(x, sigma, one)[0]
    assert torch.equal(some[:, :, :2], known[:, :, :2]) and not torch.equal(some[:, :, 2], known[:, :, 2])


def test_a_discrete_action_is_a_one_hot_vector_of_unit_variance():
    denoiser = network(action_dim=5)
    x, sigma, actions = training_inputs(denoiser)
    as_vectors = torch.eye(5)[actions] * math.sqrt(5)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(denoiser(x, sigma, actions.to(dtype))[0], denoiser(x, sigma, as_vectors)[0])
    assert farthest(denoiser(x, sigma, actions)[0], denoiser(x, sigma, -as_vectors)[0]) > 0.01


def test_continuous_actions_too_are_the_same_in_both_passes():
    denoiser = network(action_dim=2)
    x, sigma, _ = training_inputs(denoiser, frames=7)
    actions = torch.randn(2, 7, 2)
    assert_same_frames(frame_by_frame(denoiser, x, sigma, actions), denoiser(x, sigma, actions)[0])


def test_the_log_variance_depends_on_noise_level_and_position_and_nothing_else():
    denoiser = network()
    x, sigma, _ = training_inputs(denoiser, copies=3)
    sigma[:, 1:] = torch.tensor([0.1, 1.0, 10.0])[:, None]
    u = denoiser(x, sigma)[1]
    assert u.shape == (2, 3, 6)
    assert torch.equal(u, denoiser(x + 1, sigma)[1])
    assert torch.equal(u[0], u[1])
    assert (u.diff(dim=1).abs() > 1e-4).all() and (u.diff(dim=2).abs() > 1e-4).all()
    assert torch.equal(u[..., :2], denoiser(x[:, :, :2], sigma[:, :, :2])[1])      # the position, not the length


def test_bfloat16_computes_nearly_what_float32_computes():
    denoiser = network(temporal_kernel=3, action_dim=3)
    inputs = training_inputs(denoiser, 2)
    expected = denoiser(*inputs)[0]
    denoiser.dtype = torch.bfloat16
    found = denoiser(*inputs)[0]
    assert found.dtype == torch.float32 and all(p.dtype == torch.float32 for p in denoiser.parameters())
    assert 1e-4 < rms(found - expected) / rms(expected) < 0.02
    stepped = torch.stack(list(frame_by_frame(denoiser, *inputs).values()), dim=2)
    assert rms(stepped - expected) / rms(expected) < 0.02


def test_dropout_acts_in_training_only():
    denoiser = network(dropout=0.5)
    x, sigma, _ = training_inputs(denoiser)
    assert torch.equal(denoiser(x, sigma)[0], denoiser(x, sigma)[0])
    denoiser.train()
    assert farthest(denoiser(x, sigma)[0], denoiser(x, sigma)[0]) > 0.01


def test_a_model_is_rebuilt_from_its_settings_and_weights():
    denoiser = network(action_dim=3, frame_shape=(2, 8, 12), patch_size=2, video_attn_resolutions=(2,),
                       frame_attn_resolutions=(4,))
    again = Denoiser(ModelConfig(**asdict(denoiser.cfg)))
    again.load_state_dict(denoiser.state_dict())
    inputs = training_inputs(denoiser)
    assert torch.equal(denoiser(*inputs)[0], again(*inputs)[0])


# ------------------------------------------------------------------------------------------------
# Mistakes are errors that name the expected and the given.


def refusal(call, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    return str(error.value)


def assert_names(message, *parts):
    for part in parts:
        assert str(part) in message, message


def test_frames_of_another_shape_are_refused():
    denoiser = network()
    sigma = torch.ones(2, 2, 3)
    assert_names(refusal(denoiser, torch.zeros(2, 2, 3, 1, 8, 6), sigma), (1, 8, 8), (2, 2, 3, 1, 8, 6))
    assert_names(refusal(denoiser, torch.zeros(2, 2, 3, 3, 8, 8), sigma), (1, 8, 8), (2, 2, 3, 3, 8, 8))
    message = refusal(denoiser.step, torch.zeros(2, 1, 1, 4, 4), sigma[:, 0, :1], Cache())
    assert_names(message, "b t", (1, 8, 8), (2, 1, 1, 4, 4))


def test_a_training_pass_without_a_noised_copy_is_refused():
    assert_names(refusal(network(), torch.zeros(2, 1, 3, 1, 8, 8), torch.ones(2, 1, 3)), "2 copies", (2, 1, 3, 1, 8, 8))


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 4), (2, 1, 3), (2, 2, 3, 1)], ids=str)
def test_noise_levels_of_another_shape_are_refused(shape):
    assert_names(refusal(network(), torch.zeros(2, 2, 3, 1, 8, 8), torch.ones(shape)), "sigma", (2, 2, 3), shape)
    for sigma in (torch.ones(2), torch.ones([])):           # of a step, as it was given
        message = refusal(network().step, torch.zeros(2, 1, 1, 8, 8), sigma, Cache())
        assert_names(message, "sigma", "expected (2, 1)", f"given {tuple(sigma.shape)}")


def test_missing_and_unexpected_actions_are_refused():
    x, sigma, actions = torch.zeros(2, 2, 3, 1, 8, 8), torch.ones(2, 2, 3), torch.zeros(2, 3, dtype=torch.long)
    assert_names(refusal(network(action_dim=4), x, sigma), "actions", "action_dim 4", "none")
    assert_names(refusal(network(), x, sigma, actions), "actions", "action_dim 0", (2, 3))
    assert_names(refusal(network(action_dim=4).step, x[:, 1, :1], sigma[:, 1, :1], Cache()), "action_dim 4", "none")


@pytest.mark.parametrize("actions, expected", [
    (torch.zeros(2, 4, dtype=torch.long), (2, 3)), (torch.zeros(2, 3, 4, dtype=torch.long), (2, 3)),
    (torch.zeros(2, 3), (2, 3, 4)), (torch.zeros(2, 3, 5), (2, 3, 4)),
], ids=["frames", "long-vectors", "no-vectors", "vector-length"])
def test_actions_of_another_shape_are_refused(actions, expected):
    message = refusal(network(action_dim=4), torch.zeros(2, 2, 3, 1, 8, 8), torch.ones(2, 2, 3), actions)
    assert_names(message, "actions", f"expected {expected}", f"given {tuple(actions.shape)}")


def test_several_noised_frames_at_once_are_refused_and_the_cache_stays_as_it_was():
    denoiser, cache = network(), Cache()
    assert_names(refusal(denoiser.step, torch.zeros(2, 3, 1, 8, 8), torch.ones(2, 3), cache), "3", "one at a time")
    assert cache.position == 0


@pytest.mark.parametrize("changes, named", [
    ({"frame_shape": (1, 8, 10)}, ["8 x 10", "divisible by 4"]),
    ({"frame_shape": (1, 12, 8), "channel_mults": (1, 2, 2, 2)}, ["12 x 8", "divisible by 8"]),
    ({"video_attn_resolutions": (4, 5)}, ["5", "8, 4"]),
    ({"frame_attn_resolutions": (16,)}, ["16", "8, 4"]),
    ({"head_dim": 12}, ["head_dim 12", "16 channels"]),
    ({"window": 0}, ["window=0"]),
    ({"window": m.ROTARY_PERIOD}, [f"window={m.ROTARY_PERIOD}"]),
    ({"temporal_kernel": 0}, ["temporal_kernel=0"]),
], ids=str)
def test_settings_that_cannot_work_are_refused(changes, named):
    settings = {"frame_shape": (1, 8, 8), "patch_size": 2 if changes.get("frame_shape") == (1, 8, 10) else 1,
                "channels": 16, "head_dim": 16, "frame_attn_resolutions": (8,)}
    assert_names(refusal(Denoiser, ModelConfig(**settings | changes)), *named)


def test_a_cache_of_another_batch_is_refused():
    denoiser, cache = network(), Cache()
    x, sigma, _ = training_inputs(denoiser, b=2)
    denoiser.read(x[:, 0, :2], sigma[:, 0, :2], cache)
    with pytest.raises(ValueError, match="the cache is of one batch"):
        denoiser.step(x[:1, 0, :1], sigma[:1, 0, :1], cache)
