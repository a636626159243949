"""The older ways to train that tests/compare.py compares ours with: the same network, with other passes.

In training mode `forward` is the regime's own pass; in eval mode it denoises every frame given its clean past, as ours
does. Both take what train.clean_and_noised returns: x b (1 + r) t c h w, copy 0 clean, and sigma b (1 + r) t.
Two regimes never saw a clean past in training: it is told to them with a noise level, of `TOLD`, that serves them.
"""
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange

import sample
import train
from model import Attention, CausalConv, Denoiser, MPConv, Sequence, border_gain, rotate, rotation

TOLD = (0.0, 0.05, 0.1, 0.2)


# ---------------------------------------------------------------------------------------------------
# Ours, and what all share.

class OneCopy(Sequence):
    """One copy of every clip, noised or not, all of it wanted back."""

    def split(self, x):
        return x, x


class OneCopyOfLast(OneCopy):
    """... of which only the last frame is wanted back."""

    def split(self, x):
        return x, x[:, :, -1:]

    def to_noised(self, x):
        return x[:, None, -1:]


class Ours(Denoiser):
    told, past_sigma = (0.0,), 0.0                          # noise levels that the past can be told to have; the chosen

    def loss(self, clips, actions, noise, cfg):
        return train.loss_of(self, clips, actions, noise, cfg)

    def one_copy(self, x, sigma, actions, layout=OneCopy):
        """Every copy by itself, noised or not. x: b r t c h w; sigma: b r t -> D: b r t c h w, or b r 1 c h w."""
        r, t = x.shape[1:3]
        actions = None if actions is None else actions.repeat_interleave(r, 0)
        x, sigma = (rearrange(z, "b r t ... -> (b r) 1 t ...") for z in (x, sigma))
        return rearrange(self.denoise(x, sigma, actions, layout(1, t)), "(b r) 1 ... -> b r ...", r=r)


# ---------------------------------------------------------------------------------------------------
# Independent noise (Diffusion Forcing, Chen et al. 2024): frames see the noised frames before them. Last frame only:
# the same pass, its past clean; the decoder, which does not mix time, works on the last frame alone.

class Independent(Ours):
    told = TOLD

    def forward(self, x, sigma, actions=None):
        if self.training:
            return self.one_copy(x[:, 1:], sigma[:, 1:], actions), self.log_variance(sigma[:, 1:])
        past_sigma = torch.full_like(sigma[:, :1], self.past_sigma)
        return super().forward(x, torch.cat([past_sigma, sigma[:, 1:]], dim=1), actions)

    def read(self, x, sigma, cache, actions=None):
        super().read(x, sigma.clamp(min=self.past_sigma), cache, actions)


class LastFrame(Ours):
    def loss(self, clips, actions, noise, cfg):
        """Of the last frame; clips: b t c h w, the noise as for all frames."""
        def denoise_last(x, sigma, actions):
            """x: b 2 1 c h w, clean and noised last frame; sigma: b 2 1 -> D: b 1 1 c h w, u: b 1 1."""
            frames = torch.cat([clips[:, None, :-1], x[:, 1:]], dim=2)
            sigmas = F.pad(sigma[:, 1:], (clips.shape[1] - 1, 0))
            return self.one_copy(frames, sigmas, actions, OneCopyOfLast), self.log_variance(sigmas)[:, :, -1:]
        return train.loss_of(denoise_last, clips[:, -1:], actions, [z[:, :, -1:] for z in noise], cfg)


# ---------------------------------------------------------------------------------------------------
# Whole clip: one noise level for all frames, each of which sees all others. Kernel 3: before, present, after.

class BothWaysConv(CausalConv):
    def forward(self, x, scale, seq, gain=1.0):
        weight = self.scaled(x.dtype, gain * border_gain(*x.shape[2:]))
        parts = F.conv2d(x, weight.flatten(0, 1), padding=1)
        here, before, after = rearrange(parts, "(b t) (j o) h w -> j b t h w o", t=seq.frames, j=3)
        y = here + F.pad(before[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)) + F.pad(after[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1))
        taps = torch.full((seq.frames, 1, 1, 1), 3.0, device=x.device)
        taps[[0, -1]] = 2.0                                 # a missing neighbour must not shrink a frame
        return (y * (3 / taps).sqrt()).flatten(0, 1).movedim(-1, 1) * scale[:, :, None, None]


class BothWaysAttention(Attention):
    def attend(self, qkv, seq):
        if self.window == 1:
            return super().attend(qkv, seq)
        q, k = rotate(qkv[:2], *seq.position_table(rotation, qkv.device, self.head_dim // 2, qkv.dtype))
        q, k, v = (rearrange(z, "b m 1 t p d -> b m (t p) d") for z in (q, k, qkv[2]))
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b m (t p) d -> b m 1 t p d", t=seq.frames)


class WholeClip(Ours):
    told = TOLD[::2]                                        # each costs a pass per frame

    def __init__(self, cfg):
        super().__init__(replace(cfg, temporal_kernel=3))
        kinds = {CausalConv: BothWaysConv, Attention: BothWaysAttention}
        for module in (*self.unet.encoder.modules(), *self.unet.middle.modules()):
            module.__class__ = kinds.get(type(module), type(module))            # and keeps its weights

    def loss(self, clips, actions, noise, cfg):
        z, eps = noise
        return train.loss_of(self, clips, actions, [z[..., :1].expand_as(z), eps], cfg)

    def forward(self, x, sigma, actions=None):
        """In eval mode a pass per frame: those before it clean, those from it on at its noise level."""
        clean, noised, sigma = x[:, :1].expand_as(x[:, 1:]), x[:, 1:], sigma[:, 1:]
        if self.training:
            return self.one_copy(noised, sigma, actions), self.log_variance(sigma)
        denoised = []
        for t in range(x.shape[2]):
            frames = torch.cat([clean[:, :, :t], noised[:, :, t:]], dim=2)
            sigmas = torch.cat([torch.full_like(sigma[:, :, :t], self.past_sigma), sigma[:, :, t:]], dim=2)
            denoised.append(self.one_copy(frames, sigmas, actions)[:, :, t])
        return torch.stack(denoised, dim=2), self.log_variance(sigma)

    def go_on(self, clean, frames, actions, seed, levels):
        """Frames b t c h w that follow the clean ones b n c h w, all denoised together."""
        def denoise(x, sigma):
            sigmas = torch.full((len(x), 1, frames), sigma, device=x.device)
            sigmas[..., :clean.shape[1]] = self.past_sigma
            return self.one_copy(torch.cat([clean, x], dim=1)[:, None], sigmas, actions)[:, 0, clean.shape[1]:]
        shape = (len(clean), frames - clean.shape[1], *clean.shape[2:])
        noise = torch.randn(shape, generator=sample.seeded(clean.device, seed), device=clean.device)
        return sample.reverse_diffusion(denoise, noise * levels[0], levels)


# ---------------------------------------------------------------------------------------------------
# Frame stacking: no time axis in the network, the k frames before are channels beside the noised frame's.

class FrameHead(MPConv):
    """Only the noised frame's channels are computed; the past's, which nobody reads, are zeros."""

    def forward(self, x):
        return F.pad(super().forward(x), (0, 0, 0, 0, 0, self.unread))


class Stacked(Ours):
    def __init__(self, cfg, k):
        c, *size = cfg.frame_shape
        attention = (*cfg.video_attn_resolutions, *cfg.frame_attn_resolutions)
        super().__init__(replace(cfg, frame_shape=((1 + k) * c, *size), temporal_kernel=1, video_attn_resolutions=(),
                                 frame_attn_resolutions=attention))
        self.k, self.frame_channels, outputs = k, c, c * cfg.patch_size ** 2
        self.unet.head = FrameHead(outputs, cfg.channels, 3, 3)
        self.unet.head.unread = k * outputs

    def denoise_given(self, x, past, sigma, actions):
        """x: b r t c h w; past: b 1 t (k c) h w, newest first; sigma: b r t -> D: b r t c h w."""
        sd, (r, t) = self.cfg.sigma_data, x.shape[1:3]
        past = past * ((sigma ** 2 + sd ** 2).sqrt() / sd)[..., None, None, None]        # `denoise` divides by it
        denoised = self.denoise(torch.cat([x, past], dim=3), sigma, actions, OneCopy(r, t))
        return denoised[:, :, :, :self.frame_channels]

    def forward(self, x, sigma, actions=None):
        """As Denoiser's: the clean copy is where the past is taken from; zeros where there is none."""
        t, padded = x.shape[2], F.pad(x[:, :1], (0, 0, 0, 0, 0, 0, self.k, 0))
        past = torch.cat([padded[:, :, self.k - j:][:, :, :t] for j in range(1, self.k + 1)], dim=3)
        return self.denoise_given(x[:, 1:], past, sigma[:, 1:], actions), self.log_variance(sigma[:, 1:])

    def past_frames(self, x, cache):
        return cache.buffer(self, (len(x), self.k, *x.shape[2:]), x)

    @torch.no_grad()
    def read(self, x, sigma, cache, actions=None):
        past = self.past_frames(x, cache)
        past.copy_(torch.cat([past, x], dim=1)[:, -self.k:])
        cache.advance(x.shape[1])

    @torch.no_grad()
    def step(self, x, sigma, cache, actions=None):
        newest_first = rearrange(self.past_frames(x, cache).flip(1), "b k c h w -> b 1 1 (k c) h w")
        return self.denoise_given(x[:, None], newest_first, sigma[:, None], actions)[:, 0]


def one_copy(cfg):
    return {"noised_copies": 1, "context_noise": 0.0}


def four_copies(cfg):
    """Of half the clips: with dear steps, more of them serve better."""
    return {"noised_copies": 4, "context_noise": 0.0, "batch_size": max(1, cfg.batch_size // 2)}


# title, network, settings that it changes
REGIMES = {"ours": ("ours, R = 1", Ours, one_copy),
           "ours_noise": ("ours, as set, with context noise", Ours, lambda cfg: {}),
           "ours4": ("ours, R = 4", Ours, four_copies),
           "last": ("last frame only", LastFrame, one_copy),
           "stack1": ("frame stacking, k = 1", partial(Stacked, k=1), one_copy),
           "stack4": ("frame stacking, k = 4", partial(Stacked, k=4), one_copy),
           "whole": ("whole clip", WholeClip, one_copy),
           "independent": ("independent noise", Independent, one_copy)}
