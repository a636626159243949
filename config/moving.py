"""Moving MNIST, the standard protocol: two digits in 64 x 64 pixels, ten frames given and ten predicted.

    python train.py config/moving.py                                        # sized for a CPU: half an hour of one core
    python tests/compare.py --protocol --checkpoint=out/moving/checkpoint.pt
"""
out_dir = "out/moving"
dataset = "digits"
frames, frame_size = 20, 64
digits, digit_size = 2, 28
speed, whole_pixels, bounce = (3.6, 3.6), False, "reflect"    # as published: any direction, rounded to draw

# 16 x 16 patches of 16 pixels, then 8 x 8, then 4 x 4, where attention sees the ten given frames
patch_size = 4
channels, channel_mults, blocks_per_level = 32, (1, 1, 2), 1
video_attn_resolutions, window = (4,), 10
temporal_kernel = 2

P_mean, P_std = 0.0, 1.5
context_noise = 0.1

batch_size, max_steps = 4, 2600
lr, warmup_steps, decay = 0.015, 100, "linear"
eval_interval, checkpoint_interval = 650, 325
