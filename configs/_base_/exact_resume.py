# Hooks with which an interrupted run resumes and ends in the same weights as an uninterrupted one.
# A config takes them with `default_hooks = _base_.pop("exact_resume")`.
custom_imports = dict(imports=["mmsoftpool"])

exact_resume = dict(
    # Writes checkpoints completely or not at all.
    checkpoint=dict(type="AtomicCheckpointHook"),
    # Seeds every epoch (or iteration), so that its random numbers do not depend on those before.
    epoch_seed=dict(type="EpochSeedHook"),
    # Repeats a validation that was interrupted.
    missed_validation=dict(type="MissedValidationHook"),
    # Distributed processes continue with, and evaluate, the buffers that are saved.
    sync_buffers=dict(type="SyncBuffersHook"),
)
