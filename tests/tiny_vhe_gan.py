"""A VHE-GAN and a recipe for it that take no time: what several tests train."""
SIZES = dict(side=32, widths=(12, 6), trunk=(8, 8, 8), d=16, generator=dict(width=16), judge=dict(width=16), burn=3, keep=3)
TINY = dict(model=SIZES, copies=0, ema=0.9, schedule="hold_and_fall", clip=5.,
    stage1=dict(pairs=64, steps=4, batch_size=16, lr=1e-3), stage2=dict(pairs=64, steps=4, batch_size=8, lr=1e-3))
