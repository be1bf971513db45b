"""What a hospital's data can have wrong with them, each with a stable code and a sentence that says what to do."""

from medhive.errors import InvalidInput, MedHiveError, NotFound


class DataFolderMissing(NotFound):
    """The data folder or file does not exist or cannot be read."""

    code = "data-folder-missing"


class PickledData(InvalidInput):
    """The data are pickled Python objects, which are never read."""

    code = "pickled-data"


class UnknownClass(InvalidInput):
    """A class folder or label value that the study does not know."""

    code = "unknown-class"


class MissingClass(InvalidInput):
    """A class of the study has no folder here."""

    code = "missing-class"


class EmptyClass(InvalidInput):
    """A class of the study has no readable example here."""

    code = "empty-class"


class NotEnoughExamples(InvalidInput):
    """A part of the split has nothing in it."""

    code = "not-enough-examples"


class WrongColumns(InvalidInput):
    """A table's columns are not the study's; `data` names those missing and those too many."""

    code = "wrong-columns"


class WrongOption(InvalidInput):
    """A study's or site's option for a task is unknown or out of range."""

    code = "wrong-option"


class UnknownTask(NotFound):
    """No task of that name is installed at this site."""

    code = "unknown-task"


class UnknownModel(InvalidInput):
    """No model of that name is known to the task."""

    code = "unknown-model"


class WrongArchitecture(InvalidInput):
    """Weights of another model than the study's; `data` names the first tensors that differ."""

    code = "wrong-architecture"


class WrongOptimiserState(InvalidInput):
    """The optimiser's state that the site kept does not belong to this model."""

    code = "wrong-optimiser-state"


class GroupUnknown(InvalidInput):
    """The study groups examples by patient, but no group can be told for some of them."""

    code = "group-unknown"


class UnreadableExample(InvalidInput):
    """One example cannot be read; `reason` is the word that reports count it under."""

    code = "unreadable-example"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message, reason=reason)
        self.reason = reason


class DeadlinePassed(MedHiveError):
    """The round's deadline passed before the training was done."""

    code = "deadline-passed"


class TrainingDiverged(MedHiveError):
    """The loss is no longer a finite number."""

    code = "training-diverged"


class DeviceUnavailable(InvalidInput):
    """The asked-for device (a GPU) is not present."""

    code = "device-unavailable"


class AlreadyThere(InvalidInput):
    """A folder or file that would be overwritten."""

    code = "already-there"
