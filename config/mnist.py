"""One handwritten digit that bounces in 32 x 32 pixels: within 15 minutes on two CPU cores."""
out_dir = "out/mnist"
dataset = "digits"
frames, frame_size = 12, 32
digits, digit_size = 1, 20
speed, whole_pixels, bounce = (1.4, 1.5), True, "reflect"     # one pixel across and one up or down: four directions

# 16 x 16 patches of 4 pixels, then 8 x 8, then 4 x 4, where attention sees 8 frames, the present one included
patch_size = 2
channels, channel_mults, blocks_per_level = 32, (1, 1, 2), 1
video_attn_resolutions, window = (4,), 8
temporal_kernel = 2

# what the past decides shows at high noise levels, so train there more than images would want
P_mean, P_std = 0.0, 1.5

# a rollout's past is its own, imperfect work: a little noise on the clean copy teaches not to trust it blindly
context_noise = 0.1

# with unit-norm weights, short runs want a high learning rate and a decay to zero
batch_size, max_steps = 4, 3000
lr, warmup_steps, decay = 0.015, 100, "linear"
eval_interval, checkpoint_interval = 750, 375
