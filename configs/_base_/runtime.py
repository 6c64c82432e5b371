# What every MMEngine distillation config shares. The hook is what ties the model to the runner: it keeps the clock of
# loss weight schedules, checks class lists and gradients, scores the teacher once, and stores the distillation state in
# checkpoints.
custom_imports = dict(imports=['kd_dense'], allow_failed_imports=False)
custom_hooks = [dict(type='kd_dense.DistillationHook', score_teacher=True)]
