"""A world whose every move shows another view: it remembers the places it has left. 40 minutes of one CPU core.

    python train.py config/memory.py
    python sample.py --checkpoint=out/memory --truth --context=12 --out=memory.gif
"""
out_dir = "out/memory"
dataset = "world"
frames, frame_size = 16, 16
canvas_size, digits, digit_size = 48, 12, 12
speed = (16.0, 16.0)            # a move is a whole frame: three by three views

patch_size = 4
channels, channel_mults, blocks_per_level = 32, (1, 2), 1
video_attn_resolutions, window, head_dim = (4, 2), 12, 16
temporal_kernel = 2

# only where noise hides nearly everything does it pay to remember
P_mean, P_std = 1.0, 1.2
context_noise = 0.1

# adam remembers as well as muon here: error .217 with it, .232 with muon at 0.015, at noise level 10
batch_size, max_steps = 4, 14000
optimizer, lr, warmup_steps, decay = "adam", 0.06, 100, "linear"
eval_interval, checkpoint_interval, eval_clips = 2800, 1400, 128
