"""The sampler: Heun's method against exact solutions, rollouts, averaged weights of any width, and the writers."""

import copy
import io
import math
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sample as sampling
from config import UserError
from model import Cache, Denoiser, ModelConfig
from sample import (
    GIVEN_COLOUR,
    MADE_COLOUR,
    Rollout,
    ema_exponent,
    noise_levels,
    profile_overlap,
    read_actions,
    reconstruction,
    reverse_diffusion,
    roll_out,
    seeded,
    write_gif,
)
from train import PowerEMA

CPU = torch.device("cpu")
heun = partial(reverse_diffusion, solver="heun")


def write(path, videos, *options, **more):
    """Videos n t c h w, frame by frame."""
    sampling.write(path, iter(videos.swapaxes(0, 1)), *options, **more)


def make_videos(*arguments, **more):
    return np.stack(list(roll_out(*arguments, **more)), axis=1)


# ------------------------------------------------------------------------------------------------
# Noise levels and Heun's method. On a Gaussian the ideal denoiser and the exact solution are known.

MEAN, DEVIATION = 0.3, 0.5


def ideal(x, sigma):
    """E[clean | x] when clean ~ N(MEAN, DEVIATION^2)."""
    return (DEVIATION ** 2 * x + sigma ** 2 * MEAN) / (DEVIATION ** 2 + sigma ** 2)


def exact(x, sigma_from, sigma_to):
    """Where the probability flow takes x."""
    return MEAN + (x - MEAN) * math.sqrt((DEVIATION ** 2 + sigma_to ** 2) / (DEVIATION ** 2 + sigma_from ** 2))


def noise(sigma, n=100, seed=0):
    return sigma * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_noise_levels_are_edms_from_first_to_last_then_zero(rho):
    levels = noise_levels(9, 0.02, 40.0, rho)
    assert len(levels) == 10
    assert levels[0] == pytest.approx(40) and levels[-2] == pytest.approx(0.02) and levels[-1] == 0
    for i, level in enumerate(levels[:-1]):
        low, high = 0.02 ** (1 / rho), 40 ** (1 / rho)
        assert level == pytest.approx((high + i / 8 * (low - high)) ** rho)


def test_a_single_step_goes_from_the_first_noise_level_to_zero():
    assert noise_levels(1, 0.02, 40.0, 7.0) == [pytest.approx(40), 0]


@pytest.mark.parametrize("solver, first, ratio", [("heun", 0.01, 4), ("euler", 0.2, 2)])
def test_heun_converges_at_second_order_and_euler_at_first(solver, first, ratio):
    x = noise(20)
    errors = []
    for steps in (32, 64, 128):
        levels = noise_levels(steps + 1, 0.05, 20, 7)[:-1]              # without the last step, which is Euler's
        errors.append((reverse_diffusion(ideal, x, levels, solver) - exact(x, 20, 0.05)).abs().max().item())
    assert errors[0] < first
    for coarse, fine in zip(errors, errors[1:]):
        assert 0.9 * ratio < coarse / fine < 1.1 * ratio


def test_the_last_step_to_zero_is_the_denoisers_estimate():
    x = noise(2)
    assert torch.allclose(heun(ideal, x, [2.0, 0.0]), ideal(x, 2.0), rtol=0, atol=1e-12)


def test_n_steps_are_2n_minus_1_evaluations_at_the_given_levels_or_n_with_euler():
    levels, told = noise_levels(5, 0.02, 40, 7), []
    heun(lambda x, sigma: told.append(sigma) or ideal(x, sigma), noise(40), levels)
    assert told == [levels[0]] + [level for level in levels[1:-1] for _ in range(2)]
    told.clear()
    reverse_diffusion(lambda x, sigma: told.append(sigma) or ideal(x, sigma), noise(40), levels)
    assert told == levels[:-1]


def test_churn_keeps_the_marginal_distribution():
    x = MEAN + noise(math.hypot(20, DEVIATION), n=100_000)
    levels = noise_levels(256, 0.01, 20, 7)
    plain = heun(ideal, x, levels)
    churned = heun(ideal, x, levels, generator=torch.Generator().manual_seed(1), churn=40, churn_min=0.02, churn_max=30)
    for sample in (plain, churned):
        assert sample.mean().item() == pytest.approx(MEAN, abs=0.005)
        assert sample.std().item() == pytest.approx(DEVIATION, rel=0.01)
    assert abs(torch.corrcoef(torch.stack([plain, churned]))[0, 1]) < 0.1  # the start is forgotten


def test_churn_raises_the_noise_level_by_its_share_within_its_limits():
    levels, told = noise_levels(5, 0.02, 40, 7), []
    for churn, gain in ((1.0, 1.2), (100.0, math.sqrt(2))):             # EDM Algorithm 2: at most sqrt(2) a step
        told.clear()
        heun(lambda x, sigma: told.append(sigma) or ideal(x, sigma), noise(40), levels, generator=torch.Generator(),
             churn=churn, churn_min=levels[3], churn_max=levels[1])
        factors = [gain if 1 <= i <= 3 else 1 for i in range(5)]
        assert told[::2] == pytest.approx([level * factor for level, factor in zip(levels, factors)])
        assert told[1::2] == pytest.approx(levels[1:-1])


def test_a_generator_is_a_function_of_its_key_alone():
    draws = {}
    for key in [(seed, *rest) for seed in (0, 1, 7) for t in range(6) for rest in ((t,), (t, 1))]:
        torch.manual_seed(len(draws))
        draws[key] = torch.randn(4, generator=seeded(CPU, *key))
        assert torch.equal(draws[key], torch.randn(4, generator=seeded(CPU, *key)))
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(draws)


# ------------------------------------------------------------------------------------------------
# Rollouts.

LEVELS = noise_levels(3, 0.02, 20, 7)
WINDOW = 3


def small_model(**changes):
    torch.manual_seed(0)
    settings = {"frame_shape": (1, 4, 4), "patch_size": 1, "channels": 16, "channel_mults": (1,), "head_dim": 16,
                "video_attn_resolutions": (4,), "window": WINDOW, "temporal_kernel": 3}
    model = Denoiser(ModelConfig(**settings | changes)).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("gain"):
            p.uniform_(0.5, 1)
    model.unet.head_gain.fill_(0.3)                                     # an untrained model's frames must not explode
    return model


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def context():
    return 0.5 * torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def take(rollout, n):
    """b n c h w"""
    return torch.stack([next(rollout) for _ in range(n)], dim=1)


def record(model, name, monkeypatch):
    """[(x, sigma, what it returned)] of every call of the model's method from here on."""
    calls, method = [], getattr(model, name)

    def recorded(x, sigma, *others):
        out = method(x, sigma, *others)
        calls.append((x.clone(), sigma.clone(), out))
        return out
    monkeypatch.setattr(model, name, recorded)
    return calls


def test_a_rollout_is_a_function_of_its_seed_and_context(model, context):
    first = take(Rollout(model, context, LEVELS, seed=5), 4)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(take(Rollout(model, context, LEVELS, seed=5), 4), first)
    assert torch.equal(torch.get_rng_state(), state)                    # and of no global state
    assert (take(Rollout(model, context, LEVELS, seed=6), 1) - first[:, :1]).abs().max() > 0.1
    assert (take(Rollout(model, context + 0.5, LEVELS, seed=5), 1) - first[:, :1]).abs().max() > 0.01


@pytest.mark.parametrize("churn", [{}, {"churn": 2.0}], ids=["deterministic", "churn"])
def test_a_frame_is_a_function_of_seed_position_and_past_however_the_past_came_about(model, context, churn):
    whole = take(Rollout(model, context, LEVELS, seed=5, **churn), 5)
    for n in (1, 3):
        given = torch.cat([context, whole[:, :n]], dim=1)
        rest = take(Rollout(model, given, LEVELS, seed=5, **churn), 5 - n)
        assert torch.allclose(rest, whole[:, n:], rtol=0, atol=1e-4)


def test_every_frame_starts_from_noise_of_its_own(model, context, monkeypatch):
    steps = record(model, "step", monkeypatch)
    take(Rollout(model, context, LEVELS, seed=5), 15)
    starts = torch.cat([x for x, sigma, _ in steps if sigma[0, 0] == LEVELS[0]])
    starts = starts.flatten(1) / LEVELS[0]
    assert starts.shape == (30, 16)
    assert starts.std().item() == pytest.approx(1, rel=0.1)
    assert torch.corrcoef(starts).fill_diagonal_(0).abs().max() < 0.95
    assert len(starts[:, 0].unique()) == 30


def test_a_rollout_denoises_as_the_training_pass_does_given_the_same_past(context, monkeypatch):
    """Over five windows, from four given frames, with actions: each frame's last estimate is the frame itself, and
    the training pass over all frames gives the same estimates."""
    model = small_model(action_dim=3)
    actions = torch.randint(3, (2, 4 + 5 * WINDOW), generator=torch.Generator().manual_seed(2))
    steps = record(model, "step", monkeypatch)
    made = torch.stack(list(Rollout(model, context, LEVELS, actions=actions)), dim=1)
    assert made.shape == (2, 5 * WINDOW, 1, 4, 4)
    last = [step for step in steps if step[1][0, 0] == LEVELS[-2]]
    assert len(last) == made.shape[1]
    assert torch.allclose(torch.cat([out for *_, out in last], dim=1), made, rtol=0, atol=1e-5)
    clean = torch.cat([context, made], dim=1)
    noised = torch.cat([context, torch.cat([x for x, *_ in last], dim=1)], dim=1)
    sigma = torch.stack([torch.zeros(clean.shape[:2]), torch.full(clean.shape[:2], LEVELS[-2])], dim=1)
    expected = model(torch.stack([clean, noised], dim=1), sigma, actions)[0][:, 0, 4:]
    assert torch.allclose(made, expected, rtol=0, atol=5e-5)
    assert 0.1 < made.std() < 10


def test_a_rollout_may_start_from_nothing(model):
    made = take(Rollout(model, torch.zeros(2, 0, 1, 4, 4), LEVELS), 3)
    assert made.shape == (2, 3, 1, 4, 4) and made.isfinite().all()
    x = LEVELS[0] * torch.randn(2, 1, 4, 4, generator=seeded(CPU, 0, 0))
    cache = Cache()
    assert torch.equal(made[:, 0], reverse_diffusion(
        lambda x, sigma: model.step(x[:, None], torch.full((2, 1), sigma), cache)[:, 0], x, LEVELS))


def test_a_frame_is_clamped_before_it_becomes_the_past(model, context):
    limits = torch.tensor([[[-0.3]]]), torch.tensor([[[0.2]]])
    made = take(Rollout(model, context, LEVELS, limits=limits), 3)
    free = take(Rollout(model, context, LEVELS), 3)
    assert free.max() > 0.2 and free.min() < -0.3
    assert torch.equal(made[:, 0], free[:, 0].clamp(-0.3, 0.2))
    after = Rollout(model, torch.cat([context, made[:, :2]], dim=1), LEVELS, limits=limits)
    assert torch.allclose(next(after), made[:, 2], rtol=0, atol=1e-5)
    assert not torch.allclose(free[:, 2].clamp(-0.3, 0.2), made[:, 2], rtol=0, atol=1e-3)


def test_frames_come_as_they_are_made_until_they_are_stopped(model):
    clips = torch.randint(256, (2, 3, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    arguments = model, clips, 2, 6, {"mean": [0.5], "std": [0.3]}, {"levels": LEVELS}
    whole = make_videos(*arguments)
    assert whole.shape == (2, 6, 1, 4, 4) and np.array_equal(whole[:, :2], clips[:, :2])
    stop, seen = [], []
    for frame in roll_out(*arguments, stop=stop):
        seen.append(frame)
        if len(seen) == 4:
            stop.append(True)
    assert np.array_equal(np.stack(seen, axis=1), whole[:, :4])


def test_history_guidance_extrapolates_from_a_frame_without_a_past(model, context):
    """D = (1 - w) D(no past) + w D(past), written out; w = 1 leaves the rollout bitwise as it was."""
    x = LEVELS[0] * torch.randn(2, 1, 4, 4, generator=seeded(CPU, 0, 4))
    sigma = torch.full((2, 1), LEVELS[0])
    cache = Cache()
    model.read(context, torch.zeros(2, 4), cache)
    past, alone = (model.step(x[:, None], sigma, c)[:, 0] for c in (cache, Cache()))
    assert (past - alone).abs().max() > 1e-3
    for weight in (0.0, 1.0, 1.5):
        guided = Rollout(model, context, LEVELS, guidance=weight).denoise(None, True, x, LEVELS[0])
        assert torch.allclose(guided, (1 - weight) * alone + weight * past, rtol=0, atol=1e-5)
    made, guided = (take(Rollout(model, context, LEVELS, guidance=w), 2) for w in (1.0, 1.5))
    assert torch.equal(made, take(Rollout(model, context, LEVELS), 2)) and not torch.equal(made, guided)


def test_actions_are_read_from_words_and_files(tmp_path):
    assert torch.equal(read_actions("0,2,1", 3, 2, 3), torch.tensor([[0, 2, 1]] * 2))
    for array in (np.array([2, 0], np.uint8), np.array([[0.5, -1, 3], [1, 2, 3]])):
        np.save(tmp_path / "a.npy", array)
        found = read_actions(str(tmp_path / "a.npy"), 2, 1, 3)
        assert found.dtype == (torch.int64 if array.ndim == 1 else torch.float32)
        assert np.array_equal(found[0].numpy(), array)


@pytest.mark.parametrize("text, action_dim, named", [
    ("0,1", 3, r"\(2,\).*--frames=3.*\(3,\)"), ("0,1,3", 3, "0 to 3.*0 to 2"), ("0,-1,1", 3, "-1 to 1"),
    ("up,down,up", 3, "up,down,up: expected whole numbers"), ("nothing.npy", 3, "nothing.npy"), ("0,1,2", 0, "without"),
])
def test_actions_that_do_not_fit_are_named(text, action_dim, named):
    with pytest.raises(UserError, match=named):
        read_actions(text, 3, 1, action_dim)


def test_files_that_hold_no_actions_or_another_kind_are_named(tmp_path):
    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)
    np.savez(tmp_path / "zip", np.arange(3))
    np.save(tmp_path / "words.npy", np.array(["up", "down", "up"]))
    for text in (file("empty.npy", b""), file("zip.npy", (tmp_path / "zip.npz").read_bytes()),
                 str(tmp_path / "words.npy"), f"0,1,{10 ** 30}"):
        with pytest.raises(UserError, match="expected whole numbers"):
            read_actions(text, 3, 1, 3)
    np.save(tmp_path / "floats.npy", np.ones((3, 3)))
    with pytest.raises(UserError, match="floats.npy: float64; this model was trained on whole numbers"):
        read_actions(str(tmp_path / "floats.npy"), 3, 1, 3, discrete=True)
    with pytest.raises(UserError, match="0,1,2: int64; this model was trained on vectors of floats"):
        read_actions("0,1,2", 3, 1, 3, discrete=False)
    np.save(tmp_path / "unknown.npy", np.array([[0.0], [np.nan], [1.0]]))
    with pytest.raises(UserError, match="unknown.npy: not all of its numbers are finite"):
        read_actions(str(tmp_path / "unknown.npy"), 3, 1, 1)


def test_a_prompt_is_taken_as_the_clips_of_training_were(tmp_path):
    """Every fifth frame of a GIF of 20 frames a second, at 8 a second and a stride of 2; with bars, not cropped."""
    wide = np.full((8, 16, 3), 255, np.uint8)
    Image.fromarray(wide * 0).save(tmp_path / "a.gif", save_all=True, duration=50, append_images=[
        Image.fromarray(np.uint8(wide * (i / 19))) for i in range(1, 20)])
    clip = sampling.read_prompt(tmp_path / "a.gif", 4, 1, (1, 8, 8), False, fps=8, letterbox=True, stride=2)
    assert not clip[0, :, 0, :2].any() and not clip[0, :, 0, -2:].any()
    levels = clip[0, :, 0, 4, 4].double() / 255 * 19
    assert levels.round().tolist() == [0, 5, 10, 15]
    with pytest.raises(UserError, match="has 4 frames of those that training would take: give --context=4"):
        sampling.read_prompt(tmp_path / "a.gif", 5, 1, (1, 8, 8), False, fps=8, letterbox=True, stride=2)


def test_what_was_done_to_the_clips_of_training_is_done_to_a_prompt(tmp_path):
    """`given_clips` hands on the stride of training, and what the stats say that films were made with."""
    greys = np.arange(0, 200, 10, dtype=np.uint8)[:, None, None, None] + np.zeros((8, 16, 3), np.uint8)
    frames = [Image.fromarray(grey) for grey in greys]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=50)
    cfg = SimpleNamespace(prompt=tmp_path / "a.gif", context=4, samples=1, truth=False, actions="")
    state = {"settings": {"stride": 2}, "stats": {"made": {"fps": 8.0, "letterbox": True}}}
    clips, _ = sampling.given_clips(cfg, SimpleNamespace(cfg=ModelConfig(frame_shape=(1, 8, 8))), state)
    assert not clips[0, :, 0, :2].any() and clips[0, :, 0, 4, 4].tolist() == [0, 50, 100, 150]


def test_loaded_weights_are_back_on_the_sphere_and_need_no_gradients(tmp_path):
    """An average of vectors on a sphere lies inside it. Weights that need gradients would be scaled at every call."""
    torch.manual_seed(0)
    model = Denoiser(ModelConfig(frame_shape=(1, 8, 8), channel_mults=(1,), video_attn_resolutions=(2,)))
    shrunk = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    torch.save({"version": sampling.VERSION, "step": 1, "settings": {}, "stats": {}, "origin": "", "optimizer": {},
                "model_config": asdict(model.cfg), "model": model.state_dict(), "ema": {0.05: shrunk}, "recent": []},
               tmp_path / "checkpoint.pt")
    loaded, _ = sampling.load_model(tmp_path / "checkpoint.pt", 0.05, CPU)
    for (name, weight), (_, trained) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert not weight.requires_grad
        expected = trained if weight.ndim > 1 else shrunk[name]         # which has its gains
        torch.testing.assert_close(weight.data, expected.data)


@pytest.mark.parametrize("part, damage", [("model", lambda weights: weights.pop("unet.stem.weight")),
                                          ("model_config", lambda config: config.update(depth=3))])
def test_a_checkpoint_of_another_network_is_named(tmp_path, part, damage):
    model = Denoiser(ModelConfig(frame_shape=(1, 8, 8), channel_mults=(1,), video_attn_resolutions=(2,)))
    state = {"version": sampling.VERSION, "step": 1, "settings": {}, "stats": {}, "model_config": asdict(model.cfg),
             "model": model.state_dict(), "ema_width": 0.05}
    damage(state[part])
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="weights.pt holds another network"):
        sampling.load_model(tmp_path / "weights.pt", 0.05, CPU)


def test_pictures_that_are_too_large_for_a_format_are_named(tmp_path):
    frames = [np.zeros((8, 1, 32, 32), np.uint8)] * 2
    for name in ("a.gif", "a.mp4"):
        with pytest.raises(UserError, match="16896 x 2112 pixels.*--scale"):
            sampling.write(tmp_path / name, frames, scale=64)
    assert list(tmp_path.iterdir()) == []
    sampling.write(tmp_path / "a.gif", frames, scale=1)


def test_weights_that_cannot_be_written_are_one_line(tmp_path):
    model = Denoiser(ModelConfig(channels=32))
    state = dict.fromkeys(sampling.WEIGHT_KEYS)
    with pytest.raises(UserError, match="/proc/a.pt cannot be written"):
        sampling.save_weights("/proc/a.pt", model, state, 0.05, torch.bfloat16)


@pytest.mark.parametrize("discrete", [True, False])
def test_without_data_at_hand_the_checkpoint_says_what_kind_of_actions_a_model_knows(discrete, tmp_path):
    np.save(tmp_path / "vectors.npy", np.ones((2, 3)))
    texts = {True: "0,2", False: str(tmp_path / "vectors.npy")}
    cfg = SimpleNamespace(samples=1, frames=2, context=0, truth=False, prompt="", actions=texts[discrete])
    model, state = small_model(action_dim=3), {"stats": {"discrete": discrete}}
    assert sampling.given_clips(cfg, model, state)[1].is_floating_point() != discrete
    cfg.actions = texts[not discrete]
    with pytest.raises(UserError, match="this model was trained on"):
        sampling.given_clips(cfg, model, state)


def test_none_for_actions_tells_a_model_nothing_of_them_if_it_learnt_to_do_without(capsys):
    cfg = SimpleNamespace(samples=2, frames=5, context=0, truth=False, prompt="", actions="none")
    model, state = small_model(action_dim=3), {"stats": {}, "settings": {"action_dropout": 0.1}}
    clips, actions = sampling.given_clips(cfg, model, state)
    assert clips.shape == (2, 0, 1, 4, 4) and actions.tolist() == [[-1] * 5] * 2
    assert "told no actions" in capsys.readouterr().out
    state["settings"]["action_dropout"] = 0.0
    with pytest.raises(UserError, match="this model needs --actions"):
        sampling.given_clips(cfg, model, state)


def test_a_rollout_hands_on_how_to_sample(model, context, monkeypatch):
    told = []
    monkeypatch.setattr(sampling, "reverse_diffusion", lambda denoise, x, levels, **how: told.append(how) or x)
    next(Rollout(model, context, LEVELS, solver="heun", churn=3.0))
    next(Rollout(model, context, LEVELS))
    assert [(how["solver"], how["churn"]) for how in told] == [("heun", 3.0), ("euler", 0.0)]


def test_a_copied_rollout_goes_on_as_its_original(model, context):
    rollout = Rollout(model, context, LEVELS, seed=3)
    next(rollout)
    other = copy.deepcopy(rollout)
    found = [next(other) for _ in range(3)]                             # the copy first: it has a past of its own
    assert all(torch.equal(next(rollout), frame) for frame in found)


def test_an_unknown_solver_is_refused(model, context):
    with pytest.raises(ValueError, match="'ddim': choose"):
        next(Rollout(model, context, LEVELS, solver="ddim"))


@pytest.mark.parametrize("latent", [False, True])
def test_pixels_stay_from_black_to_white_and_latents_are_free(latent):
    model, stats = small_model(), {"mean": [0.25], "std": [5.0], "latent": latent}
    clips = torch.zeros(2, 3, 1, 4, 4, dtype=torch.float16 if latent else torch.uint8)
    rollout = sampling.start_rollout(model, clips, stats, {"levels": [50.0, 0.0]})
    frames = torch.cat([next(rollout) for _ in range(4)])
    black, white = (model.cfg.sigma_data * (x - 0.25) / 5 for x in (0, 1))
    inside = frames.min() >= black - 1e-6 and frames.max() <= white + 1e-6
    assert bool(inside) != latent and frames.std() > 0


def test_a_rollout_ends_with_its_actions(context):
    model = small_model(action_dim=3)
    actions = torch.zeros(2, 9, dtype=torch.long)
    rollout = Rollout(model, context, LEVELS, actions=actions)
    assert len(list(rollout)) == 5
    assert list(rollout) == []
    turned = actions.clone()
    turned[:, 6] = 1
    made, other = (torch.stack(list(Rollout(model, context, LEVELS, actions=a))) for a in (actions, turned))
    assert torch.equal(made[:2], other[:2])                             # frames 4 and 5: before the other action
    assert ((made[2:] - other[2:]).flatten(1).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_reading_the_context_at_once_is_reading_it_frame_by_frame(model, context, level):
    at_once = Rollout(model, context, LEVELS, context_noise=level)
    in_turn = Rollout(model, context[:, :0], LEVELS, context_noise=level)
    for frame in context.split(1, dim=1):
        in_turn.read(frame, None)
    assert torch.allclose(take(at_once, 3), take(in_turn, 3), rtol=0, atol=1e-4)


def test_the_caches_never_grow_and_never_move(model, context):
    rollout = Rollout(model, context, LEVELS)

    def places():
        return {layer: (x.data_ptr(), x.shape, x.untyped_storage().nbytes())
                for layer, x in rollout.cache.tensors.items()}
    next(rollout)
    before = places()
    made = take(rollout, 20)
    assert places() == before and len(before) > 4
    assert made.isfinite().all() and made.abs().max() < 20
    assert rollout.cache.position == 4 + 21


@pytest.mark.parametrize("given, guidance", [(4, 1.0), (0, 1.5)])
def test_a_compiled_rollout_is_the_same_from_two_graphs(model, context, monkeypatch, given, guidance):
    """Traced, with its operations left as they are: one graph of an evaluation and one of reading a frame serve all
    frames, over more than three windows, and another rollout too."""
    graphs, compiler = [], torch.compile

    def count(graph, inputs, **_):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    monkeypatch.setattr(torch, "compile", lambda method, mode, **how: compiler(method, backend=count, **how))
    torch._dynamo.reset()
    rollouts = [dict(levels=LEVELS, seed=seed, guidance=guidance, context_noise=0.1) for seed in (0, 1)]
    fresh = copy.deepcopy(model)                            # whose weights nothing has frozen yet
    expected = [take(Rollout(model, context[:, :given], **how), 4 * WINDOW) for how in rollouts]
    model = fresh
    model.step, model.read = sampling.compiled(model.step), sampling.compiled(model.read)
    for how, frames in zip(rollouts, expected, strict=True):
        assert (take(Rollout(model, context[:, :given], **how), 4 * WINDOW) - frames).abs().max() < 1e-5
    assert len(graphs) == 2
    assert not any(".item()" in graph.code for graph in graphs)         # no number that a GPU would have to hand over
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_a_model_that_mixes_no_time_is_compiled_too(monkeypatch):
    """Its layers keep nothing in the cache."""
    compiled, compiler = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda method, mode, **how: compiler(
        method, backend=lambda graph, _: compiled.append(graph) or graph, **how))
    torch._dynamo.reset()
    model = Denoiser(ModelConfig(frame_shape=(1, 8, 8), channels=16, channel_mults=(1,), temporal_kernel=1,
                                 video_attn_resolutions=())).eval().requires_grad_(False)
    model.step = sampling.compiled(model.step)
    take(Rollout(model, torch.zeros(1, 0, 1, 8, 8), LEVELS), 3)
    assert len(compiled) == 1


def test_a_frame_asks_for_its_number_once_however_many_evaluations_it_takes(model, context, monkeypatch):
    """On a GPU each time is a wait until all that was asked of it is done."""
    asked, position = [], Cache.position.fget
    rollout = Rollout(model, context, noise_levels(5), guidance=1.5)
    monkeypatch.setattr(Cache, "position", property(lambda cache: asked.append(cache) or position(cache)))
    rollout.advance()
    assert len(asked) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_a_rollout_of_cuda_graphs_is_the_same(model, context, dtype, tolerance):
    """And is made of them: torch leaves them out in silence where it cannot record them."""
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_trees import get_manager
    model, context = copy.deepcopy(model).cuda(), context.cuda()
    model.dtype = dtype
    expected = take(Rollout(model, context, LEVELS, guidance=1.5), 4 * WINDOW)
    model.step, model.read = sampling.compiled(model.step), sampling.compiled(model.read)
    counters.clear()
    for _ in range(2):
        made = take(Rollout(model, context, LEVELS, guidance=1.5), 4 * WINDOW)
        assert (made - expected).abs().mean() < tolerance
    manager = get_manager(0, create_if_none_exists=False)
    assert manager and any(manager.roots.values()) and counters["inductor"]["cudagraph_skips"] == 0


def test_the_past_is_read_with_the_context_noise_and_the_frames_are_given_without(model, context, monkeypatch):
    reads = record(model, "read", monkeypatch)
    rollout = Rollout(model, context, LEVELS, context_noise=0.3)
    made = take(rollout, 20)
    assert all((sigma == 0.3).all() for _, sigma, _ in reads)
    added = torch.cat([x for x, *_ in reads], dim=1) - torch.cat([context, made], dim=1)
    assert added.std().item() == pytest.approx(0.3, rel=0.1)
    assert len(added[:, :, 0, 0, 0].unique()) == 2 * 24                 # fresh for every frame
    assert torch.equal(take(Rollout(model, context, LEVELS, context_noise=0.3), 3), made[:, :3])
    assert (take(Rollout(model, context, LEVELS), 1) - made[:, :1]).abs().max() > 0.01


def test_without_context_noise_the_past_is_read_as_it_is(model, context, monkeypatch):
    reads = record(model, "read", monkeypatch)
    made = take(Rollout(model, context, LEVELS), 2)
    assert torch.equal(torch.cat([x for x, *_ in reads], dim=1), torch.cat([context, made], dim=1))
    assert all((sigma == 0).all() for _, sigma, _ in reads)


# ------------------------------------------------------------------------------------------------
# Averages of the weights with any width: profiles p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on 0..T.


def profile(t, end, gamma):
    """By its definition, normalised numerically: the sum of t^gamma over the midpoints t before `end` is 1."""
    weights = np.where(t < end, (t / t[-1]) ** gamma, 0)
    return weights / weights.sum()


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.15, 0.25])
def test_the_exponent_gives_a_profile_of_that_standard_deviation(width):
    t = (np.arange(100_000) + 0.5) / 100_000
    p = profile(t, 1, ema_exponent(width))
    mean = (p * t).sum()
    assert math.sqrt((p * (t - mean) ** 2).sum()) == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("ends", [(1000, 1000), (1000, 600), (250, 1000)], ids=str)
@pytest.mark.parametrize("widths", [(0.05, 0.05), (0.05, 0.1), (0.2, 0.02)], ids=str)
def test_the_overlap_of_profiles_is_their_products_integral(ends, widths):
    (end_a, end_b), (gamma_a, gamma_b) = ends, map(ema_exponent, widths)
    step = 0.01
    t = np.arange(0, 1000, step) + step / 2
    expected = (profile(t, end_a, gamma_a) * profile(t, end_b, gamma_b)).sum() / step
    assert profile_overlap(end_a, gamma_a, end_b, gamma_b) == pytest.approx(expected, rel=1e-3)


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def track(trajectory, widths, every):
    """({width: average at the end}, {(step, width): average}) of PowerEMA along the trajectory, steps x 3."""
    model, snapshots = Weight(), {}
    ema = PowerEMA(model, widths)
    for step, value in enumerate(trajectory, start=1):
        model.weight.data.copy_(value)
        ema.update(step)
        if step % every == 0:
            snapshots |= {(step, width): ema.averages[width]["weight"].clone() for width in widths}
    return {width: ema.averages[width]["weight"] for width in widths}, snapshots


@pytest.fixture(scope="module")
def trajectory():
    """2000 steps of a wandering weight, in three coordinates."""
    return torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_running_average_is_the_sum_weighted_with_the_power_of_the_step(trajectory, width):
    found = track(trajectory, [width], every=10_000)[0][width]
    edges = (np.arange(2001) / 2000) ** (ema_exponent(width) + 1)       # step t has the integral over t - 1 .. t
    weights = torch.tensor(np.diff(edges))
    assert torch.allclose(found, (weights[:, None] * trajectory).sum(0), rtol=0, atol=1e-9)
    # The integral is t^gamma but for half a step, by which a weight moves less than its deviation per step, 1.
    powers = torch.tensor(profile(np.arange(1.0, 2001), 2001, ema_exponent(width)))
    assert (found - (powers[:, None] * trajectory).sum(0)).abs().max() < 0.05


@pytest.mark.parametrize("width", [0.07, 0.15])
def test_an_average_of_any_width_is_rebuilt_from_snapshots_of_two(trajectory, width):
    """Within 1% of the trajectory's spread (0.1% is found), while the tracked averages are far from the wanted."""
    wanted = track(trajectory, [width], every=10_000)[0][width]
    _, snapshots = track(trajectory, [0.05, 0.1], every=100)
    spread = trajectory.std(0)
    amounts, missed = reconstruction([step for step, _ in snapshots], [w for _, w in snapshots], 2000, width)
    assert 0 <= missed < 1e-4
    rebuilt = sum(float(amount) * average for amount, average in zip(amounts, snapshots.values(), strict=True))
    assert ((rebuilt - wanted).abs() / spread).max() < 0.01
    for tracked in (0.05, 0.1):
        assert ((snapshots[2000, tracked] - wanted).abs() / spread).max() > 0.03


def test_the_average_of_a_tracked_width_is_its_own_snapshot():
    steps, widths = [100, 100, 200, 200], [0.05, 0.1, 0.05, 0.1]
    amounts, missed = reconstruction(steps, widths, 200, 0.1)
    assert amounts == pytest.approx([0, 0, 0, 1], abs=1e-6) and missed == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("width", [0.01, 0.03, 0.25])
def test_what_snapshots_cannot_rebuild_is_the_squared_distance_of_the_profiles(width):
    """As shares of the wanted one's square; against a sum over a fine grid of times."""
    steps, widths = [100, 100, 200, 200], [0.05, 0.1, 0.05, 0.1]
    amounts, missed = reconstruction(steps, widths, 200, width)
    times = (np.arange(40_000) + 0.5) / 200
    wanted = profile(times, 200, ema_exponent(width))
    rebuilt = sum(a * profile(times, t, ema_exponent(w))
                  for a, t, w in zip(amounts, steps, widths, strict=True))
    assert missed == pytest.approx(((rebuilt - wanted) ** 2).sum() / (wanted ** 2).sum(), rel=1e-2)


# ------------------------------------------------------------------------------------------------
# Writers. Videos are uint8 arrays n t c h w.


@pytest.fixture
def videos():
    return np.random.default_rng(0).integers(0, 256, (3, 5, 3, 6, 8), dtype=np.uint8)


def pictures_of(path):
    with Image.open(path) as file:
        pictures = []
        for i in range(getattr(file, "n_frames", 1)):
            file.seek(i)
            pictures.append((np.asarray(file.convert("RGB")), file.info.get("duration")))
    return pictures


def assert_close_colour(pixels, colour):
    """GIF has 256 colours a picture, so a colour may be slightly off."""
    assert np.abs(pixels.astype(int) - colour).max() <= 24, pixels


@pytest.mark.parametrize("kind, expected", [(np.uint8, (3, 5, 6, 8, 3)), (np.float16, (3, 5, 3, 6, 8))])
def test_an_array_is_laid_out_as_given_ones_are(tmp_path, videos, kind, expected):
    """So that it can be a prompt: pixels t h w c, latents t c h w."""
    write(tmp_path / "a.npy", videos.astype(kind))
    made = np.load(tmp_path / "a.npy")
    assert made.shape == expected and made.dtype == kind
    assert np.array_equal(made if kind == np.float16 else made.transpose(0, 1, 4, 2, 3), videos)


def test_a_gif_has_the_frames_side_by_side_at_its_speed_with_the_given_ones_marked(tmp_path, videos):
    write(tmp_path / "a.gif", videos // 128 * 255, given=2, scale=4, fps=5)
    pictures = pictures_of(tmp_path / "a.gif")
    assert len(pictures) == 5
    for t, (picture, duration) in enumerate(pictures):
        assert duration == 200
        assert picture.shape == (6 * 4 + 4, 3 * (8 * 4 + 4), 3)
        for i in range(3):
            cell = picture[:, i * 36:(i + 1) * 36]
            border = np.ones(cell.shape[:2], bool)
            border[2:-2, 2:-2] = False
            assert_close_colour(cell[border], GIVEN_COLOUR if t < 2 else MADE_COLOUR)
            inside = cell[2:-2, 2:-2].reshape(6, 4, 8, 4, 3)
            assert_close_colour(inside, videos[i, t].transpose(1, 2, 0)[:, None, :, None] // 128 * 255)


def test_a_gif_plays_for_ever(tmp_path, videos):
    write(tmp_path / "a.gif", videos)
    assert (tmp_path / "a.gif").read_bytes()[-1:] == b";"               # its end, without which some take it for torn
    with Image.open(tmp_path / "a.gif") as file:
        assert file.info["loop"] == 0


def test_a_gif_is_written_as_its_frames_are_made(videos):
    """So that a long rollout takes no more memory than a short one."""
    file, written = io.BytesIO(), []

    def frames():
        for frame in videos.swapaxes(0, 1):
            written.append(file.tell())
            yield frame
    write_gif(file, frames(), given=0, scale=4, fps=10)
    assert len(set(written)) == len(written) == 5


def test_a_gif_of_many_videos_has_rows_of_eight(tmp_path):
    write(tmp_path / "a.gif", np.random.default_rng(0).integers(0, 256, (11, 3, 1, 4, 4), dtype=np.uint8), scale=2)
    assert [picture.shape for picture, _ in pictures_of(tmp_path / "a.gif")] == [(2 * 10, 8 * 10, 3)] * 3


def test_a_contact_sheet_has_a_row_per_video_and_a_column_per_frame(tmp_path, videos):
    write(tmp_path / "a.png", videos, given=2, scale=3)
    (sheet, _), = pictures_of(tmp_path / "a.png")
    height, width = 6 * 3 + 2, 8 * 3 + 2
    assert sheet.shape == (3 * height, 5 * width, 3)
    for i in range(3):
        for t in range(5):
            cell = sheet[i * height:(i + 1) * height, t * width:(t + 1) * width]
            assert (cell[0] == (GIVEN_COLOUR if t < 2 else MADE_COLOUR)).all()
            assert np.array_equal(cell[1:-1, 1:-1][::3, ::3], videos[i, t].transpose(1, 2, 0))


def test_grey_videos_are_grey_pictures(tmp_path, videos):
    write(tmp_path / "a.png", videos[:, :, :1], scale=1)
    (sheet, _), = pictures_of(tmp_path / "a.png")
    cell = sheet[:8, :10]
    assert np.array_equal(cell[1:-1, 1:-1], videos[0, 0, :1].transpose(1, 2, 0).repeat(3, 2))


def test_an_array_is_uint8_samples_frames_height_width_channels(tmp_path, videos):
    write(tmp_path / "a.npy", videos)
    found = np.load(tmp_path / "a.npy")
    assert found.dtype == np.uint8 and found.shape == (3, 5, 6, 8, 3)
    assert np.array_equal(found, videos.transpose(0, 1, 3, 4, 2))


def test_a_file_goes_into_a_folder_that_it_makes(tmp_path, videos):
    write(tmp_path / "new" / "folder" / "a.npy", videos)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["a.npy"]


def test_an_unknown_extension_is_an_error_that_names_the_known_ones(tmp_path, videos):
    with pytest.raises(UserError, match=r"a\.avi.*\.gif, \.png, \.npy"):
        write(tmp_path / "a.avi", videos)
    assert list(tmp_path.iterdir()) == []


def test_films_without_pyav_are_an_error_that_names_it(tmp_path, videos, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a\.mp4.*pip install av"):
        write(tmp_path / "a.mp4", videos)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_a_film_has_the_frames_side_by_side_at_its_speed(tmp_path, name):
    """Flat frames of known greys, of odd size; film compression may be off by a little."""
    av = pytest.importorskip("av")
    greys = np.array([[40, 80, 120, 160], [200, 60, 220, 90]], np.uint8)                    # n t
    videos = np.broadcast_to(greys[:, :, None, None, None], (2, 4, 1, 15, 15)).copy()
    write(tmp_path / name, videos, scale=3, fps=7)
    with av.open(str(tmp_path / name)) as film:
        assert film.streams.video[0].average_rate == 7
        pictures = [frame.to_ndarray(format="gray") for frame in film.decode(video=0)]
    assert len(pictures) == 4 and pictures[0].shape == (48, 94)         # cells of 45 + 2 edges, even
    for t, picture in enumerate(pictures):
        for n, grey in enumerate(greys[:, t]):
            assert abs(float(picture[12:35, 47 * n + 12:47 * n + 35].mean()) - grey) < 6


@pytest.mark.parametrize("name", ["a.gif", "a.mp4", "a.webm"])
def test_frames_are_written_as_they_are_made_and_kept_if_one_fails(tmp_path, name):
    av = pytest.importorskip("av")
    frames = np.random.default_rng(0).integers(0, 256, (100, 1, 1, 32, 32), dtype=np.uint8)
    sizes = []

    def failing():
        for frame in frames:
            sizes.append((tmp_path / name).stat().st_size if (tmp_path / name).exists() else 0)
            yield frame
        raise UserError("the last frame is not finite")
    with pytest.raises(UserError, match="the last frame"):
        sampling.write(tmp_path / name, failing())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert 0 < sizes[80] <= sizes[99] < (tmp_path / name).stat().st_size
    if name == "a.gif":
        assert len(pictures_of(tmp_path / name)) == 100
    else:
        with av.open(str(tmp_path / name)) as film:
            assert sum(1 for _ in film.decode(video=0)) == 100


@pytest.mark.parametrize("name", ["a.gif", "a.mp4"])
def test_what_fails_before_a_frame_is_made_leaves_the_old_file(tmp_path, name, monkeypatch):
    pytest.importorskip("av")
    (tmp_path / name).write_bytes(b"made before")

    def given_alone():
        yield from np.zeros((3, 1, 1, 8, 8), np.uint8)
        raise UserError("the first that is made")
    with pytest.raises(UserError, match="the first that is made"):
        sampling.write(tmp_path / name, given_alone(), given=3)
    if name == "a.mp4":
        monkeypatch.setitem(sampling.WRITERS, ".mp4", partial(sampling.write_film, kind="mp4", codec="libnothing"))
        with pytest.raises(UserError, match="a.mp4: this PyAV cannot encode it"):
            sampling.write(tmp_path / name, given_alone())
    assert (tmp_path / name).read_bytes() == b"made before"


def test_a_film_made_twice_is_the_same_file(tmp_path, videos):
    pytest.importorskip("av")
    for name in ("a.webm", "b.webm"):
        write(tmp_path / name, videos)
    assert (tmp_path / "a.webm").read_bytes() == (tmp_path / "b.webm").read_bytes()


def test_a_gif_keeps_a_speed_that_its_clock_cannot_count(tmp_path, videos):
    write(tmp_path / "a.gif", np.concatenate([videos] * 3, axis=1), fps=30)
    durations = [duration for _, duration in pictures_of(tmp_path / "a.gif")]
    assert set(durations) == {30, 40} and sum(durations) == 500                             # 15 frames


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_a_failed_writer_leaves_nothing_behind_and_the_old_file_whole(tmp_path, videos, name):
    odd = videos.repeat(2, axis=2)                                      # six channels are no picture
    with pytest.raises(UserError, match=r"6 channels.*\.npy"):
        write(tmp_path / name, odd)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / name, videos)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError):
        write(tmp_path / name, odd)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before
