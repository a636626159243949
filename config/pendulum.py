"""A pendulum swung by a torque that you choose, recorded with gymnasium: a world to steer after minutes on a CPU.

    pip install "gymnasium[classic-control]"
    python data.py --env=Pendulum-v1 --out=data/pendulum --episodes=100 --size=32
    python train.py config/pendulum.py
    python sample.py --checkpoint=out/pendulum --play
"""
out_dir = "out/pendulum"
dataset = "video"
data_dir = "data/pendulum"
frames, frame_size = 12, 32
action_dropout = 0.1            # so that it also swings on without a hand

# 16 x 16 patches of 4 pixels, then 8 x 8, then 4 x 4, where attention sees 8 frames, the present one included
patch_size = 2
channels, channel_mults, blocks_per_level = 32, (1, 1, 2), 1
video_attn_resolutions, window = (4,), 8
temporal_kernel = 2

P_mean, P_std = 0.0, 1.5
context_noise = 0.1

batch_size, max_steps = 4, 1500
lr, warmup_steps, decay = 0.015, 100, "linear"
eval_interval, checkpoint_interval = 500, 250
