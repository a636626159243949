"""A canvas of digits seen through a window that you move: the smallest world model, for a CPU.

    python train.py config/world.py
    python sample.py --checkpoint=out/world --truth --out=world.gif
"""
out_dir = "out/world"
dataset = "world"
frames, frame_size = 16, 32
canvas_size, digits, digit_size = 64, 9, 16
speed = (4.0, 4.0)              # a move is two patches: four pixels

patch_size = 2
channels, channel_mults, blocks_per_level = 16, (1, 2, 4), 1
video_attn_resolutions, window = (4,), 12
temporal_kernel = 2

P_mean, P_std = 0.0, 1.5
context_noise = 0.1

batch_size, max_steps = 4, 3400
lr, warmup_steps, decay = 0.015, 100, "linear"
eval_interval, checkpoint_interval = 850, 425
