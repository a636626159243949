"""Moving MNIST, the standard protocol: two digits in 64 x 64 pixels, ten frames given and ten predicted.

    python train.py config/moving.py                                        # sized for a CPU: 53 minutes of one core
    python tests/compare.py --protocol --checkpoint=out/moving/checkpoint.pt
"""
out_dir = "out/moving"
dataset = "digits"
frames, frame_size = 12, 64     # two more than attention sees
digits, digit_size = 2, 28
speed, whole_pixels, bounce = (3.6, 3.6), False, "reflect"    # as published: any direction, rounded to draw

# 32 x 32 patches of 4 pixels, then 16 x 16, 8 x 8, and 4 x 4, where attention sees ten frames, the present one included
patch_size = 2
channels, channel_mults, blocks_per_level = 32, (1, 1, 2, 2), 1
video_attn_resolutions, window = (4,), 10
temporal_kernel = 2

P_mean, P_std = 0.0, 1.5
context_noise = 0.1

batch_size, max_steps = 4, 3000
lr, warmup_steps, decay = 0.015, 100, "linear"
eval_interval, checkpoint_interval = 1000, 250
