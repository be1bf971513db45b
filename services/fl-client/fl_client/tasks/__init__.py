"""Tasks: one module per kind of data. Importing this package loads no heavy library."""

from fl_client.tasks.base import (
    PARTS,
    DataReport,
    EpochProgress,
    LocalOptions,
    Part,
    Prediction,
    RoundPlan,
    Skipped,
    Task,
    Training,
    TrainResult,
    Workspace,
    finish,
    load_task,
    task_names,
)

__all__ = [
    "PARTS",
    "DataReport",
    "EpochProgress",
    "LocalOptions",
    "Part",
    "Prediction",
    "RoundPlan",
    "Skipped",
    "Task",
    "TrainResult",
    "Training",
    "Workspace",
    "finish",
    "load_task",
    "task_names",
]
