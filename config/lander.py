"""A moon lander driven by its actions, at 64 x 64 pixels, from episodes recorded with gymnasium.

    pip install "gymnasium[box2d]"
    python data.py --env=LunarLander-v3 --out=data/lander --episodes=200 --size=64
    python train.py config/lander.py
    python sample.py --checkpoint=out/lander --truth --out=lander.gif
"""
out_dir = "out/lander"
dataset = "video"
data_dir = "data/lander"
frames, frame_size = 24, 64
action_dropout = 0.1            # so that it also dreams on without a pilot

# 32 x 32 patches of 4 pixels, then 16 x 16, then 8 x 8, where attention sees 16 frames, the present one included
patch_size = 2
channels, channel_mults, blocks_per_level = 64, (1, 1, 2), 1
video_attn_resolutions, head_dim, window = (8,), 64, 16
temporal_kernel = 2

P_mean, P_std = -0.4, 1.4
context_noise = 0.1

batch_size, max_steps = 8, 20_000
lr, warmup_steps, decay = 0.01, 500, "linear"
eval_interval, checkpoint_interval = 1000, 1000
