"""64 x 64 RGB clips from a prepared folder, at GPU scale.

    torchrun --nproc_per_node=8 train.py config/video.py --data_dir=data/video
"""
out_dir = "out/video"
dataset = "video"
data_dir = "data/video"
frames, frame_size = 32, 64

# 32 x 32 patches of 4 pixels; attention at 16 x 16 and 8 x 8 sees 16 frames, the present one included
patch_size = 2
channels, channel_mults, blocks_per_level = 128, (1, 2, 4), 2
video_attn_resolutions, head_dim, window = (16, 8), 64, 16
temporal_kernel = 2

# one clean copy serves two noised ones; a little noise on it steadies long rollouts
noised_copies = 2
context_noise = 0.3
P_mean, P_std = -0.4, 1.2

batch_size, accumulate = 64, 1

# EDM2's optimizer and rate: muon, which learns digits in fewer steps, was not tried at this size
optimizer = "adam"
max_steps, lr, warmup_steps = 200_000, 0.01, 2000
decay, ref_steps = "sqrt", 30_000
eval_interval, checkpoint_interval = 5000, 5000
