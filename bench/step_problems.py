"""The problems that bench/step.py and bench/step_cuda.py time: hyper-parameters, and shapes of models."""

LR, BETA, DECAY, EPSILON, RATE, CAP = 0.1, 0.9, 1e-4, 0.5, 0.1, 0.25
HYPER = dict(
    lr=LR, momentum=BETA, weight_decay=DECAY, epsilon=EPSILON, rate=RATE, cap=CAP, bound=2.0, kappa=0.1
)
# Numbers of a rule that differ: the defaults of its form.
DEFAULTS = {"askew_memory": {"rate": float("inf")}, "splitting": {"weight_decay": 0.0}}
RESNET18 = [
    (64, 3, 3, 3), *[(64, 64, 3, 3)] * 4, (128, 64, 3, 3), *[(128, 128, 3, 3)] * 3, (128, 64, 1, 1), (256, 128, 3, 3),
    *[(256, 256, 3, 3)] * 3, (256, 128, 1, 1), (512, 256, 3, 3), *[(512, 512, 3, 3)] * 3, (512, 256, 1, 1),
    *[(64,)] * 10, *[(128,)] * 10, *[(256,)] * 10, *[(512,)] * 10, (1000, 512), (1000,),
]  # fmt: skip
GPT2_BLOCK = [
    (768,),
    (768,),
    (2304, 768),
    (2304,),
    (768, 768),
    (768,),
    (768,),
    (768,),
    (3072, 768),
    (3072,),
    (768, 3072),
    (768,),
]
GPT2 = [(50257, 768), (1024, 768), *GPT2_BLOCK * 12, (768,), (768,)]
