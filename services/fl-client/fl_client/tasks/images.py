"""Reading a folder of images: what is used, what is skipped and why, and which part of the split each image is in.

Files come from scanners, exports and people, so every one is taken as hostile: sizes are limited before anything is
decoded, only JPEG and PNG decoders are tried, links may not lead out of the folder, and one bad file never stops the
rest. This module needs no torch, so that `check-data` starts quickly.
"""

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fl_client.tasks.base import (
    DataReport,
    LocalOptions,
    OnProgress,
    Part,
    Skipped,
    part_of,
    read_options,
)
from fl_client.tasks.errors import (
    EmptyClass,
    NotEnoughExamples,
    UnknownClass,
    UnreadableExample,
    WrongOption,
)
from fl_client.tasks.folders import class_folders, groups_of_csv, known_group, walk
from fl_client.tasks.packed_images import PackedImage, packed_files, read_packed, require_unpickled
from medhive.spec import StudyData

SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
FORMATS = ("JPEG", "PNG")
MAX_FILE_BYTES = 64 * 2**20  # an uncompressed 16-bit mammogram of 30 megapixels is 60 MB
MAX_PIXELS = 50_000_000  # 150 MB decoded in colour; larger than any slice or radiograph
MAX_FILES = 2_000_000  # names alone are then 200 MB
MIN_SIZE, MAX_SIZE = 24, 1024  # the models halve four times; 1024 × 1024 is all that 2-D scans carry
MAX_PATTERN = 100
RECIPES = ("clinical", "plain")
PIXELS = ("whitened", "unit")
OF_PLAIN = ("momentum", "lr_decay", "weight_decay", "pixels", "crop", "pad", "brightness", "contrast")
MAX_LEVEL = 255
MAX_STARS = 2  # keeps matching a name of 255 characters cheap whatever the pattern
SIXTEEN_BIT_SHIFT = 8

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImageOptions:
    """A study's options of the task `image-folder`.

    Attributes:
        image_size: height and width in pixels that every image is brought to.
        channels: 1 (grey) or 3 (colour).
        model: one of `fl_client.tasks.models`, by name.
        recipe: `clinical`, which `fl_client.tasks.training` describes, or `plain`: SGD as published studies use it, at a
            constant rate.
        momentum, lr_decay, weight_decay: of the plain recipe; its rate is multiplied by `lr_decay` after each round.
        pixels: of the plain recipe: `whitened`, each image by itself, or `unit`, as they are from 0 to 1.
        crop: of the plain recipe: side of the square that the model sees of each image, drawn and mirrored at random in
            training, the middle one in judging; 0 sees all of it, unchanged.
        pad: by how many pixels, mirrored at its edge, an image grows before a square is drawn from it.
        brightness, contrast: how far training changes them at most: in levels of 255, and as a share of each channel's
            distance from its mean.
        group_pattern: how the patient is told from a file's name, as "{group}_*": `{group}` stands for the patient,
            `*` for anything, all else for itself; matched against the path within the class folder. Empty: no groups.
        allow_missing_classes: whether a site may lack a class.
    """

    image_size: int = 96
    channels: int = 1
    model: str = "resnet-gn"
    recipe: str = "clinical"
    momentum: float = 0.0
    lr_decay: float = 1.0
    weight_decay: float = 0.0
    pixels: str = "whitened"
    crop: int = 0
    pad: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    group_pattern: str = ""
    allow_missing_classes: bool = False

    @classmethod
    def of(cls, study: StudyData) -> "ImageOptions":
        """Options from the study.

        Raises:
            WrongOption: an option is unknown, of another type or out of range.
        """
        options = read_options(cls, study)
        options._require_ranges()
        return options

    def _require_ranges(self) -> None:
        if not MIN_SIZE <= self.image_size <= MAX_SIZE:
            raise WrongOption(f"Option 'image_size' must be {MIN_SIZE} to {MAX_SIZE} pixels.", option="image_size")
        if self.channels not in {1, 3}:
            raise WrongOption("Option 'channels' must be 1 (grey) or 3 (colour).", option="channels")
        if self.recipe not in RECIPES:
            raise WrongOption(f"Option 'recipe' must be one of {', '.join(RECIPES)}.", option="recipe")
        if self.pixels not in PIXELS:
            raise WrongOption(f"Option 'pixels' must be one of {', '.join(PIXELS)}.", option="pixels")
        if not (0 <= self.momentum < 1 and 0 < self.lr_decay <= 1 and 0 <= self.weight_decay < 1):
            raise WrongOption(
                "Options 'momentum' and 'weight_decay' must be 0 to below 1, 'lr_decay' above 0 to 1.",
                option="momentum",
            )
        if self.crop and not MIN_SIZE <= self.crop <= self.image_size:
            raise WrongOption(f"Option 'crop' must be {MIN_SIZE} to image_size pixels.", option="crop")
        if self.pad and not (self.crop and 0 < self.pad < self.image_size):
            raise WrongOption("Option 'pad' must be 0 to below image_size, and needs 'crop'.", option="pad")
        if not (0 <= self.brightness <= MAX_LEVEL and 0 <= self.contrast <= 1):
            raise WrongOption("Option 'brightness' must be 0 to 255, 'contrast' 0 to 1.", option="brightness")
        changed = [name for name in OF_PLAIN if getattr(self, name) != getattr(ImageOptions, name)]
        if changed and self.recipe != "plain":
            raise WrongOption(f"Option {changed[0]!r} is of the recipe plain alone.", option=changed[0])
        if self.group_pattern:
            _pattern(self.group_pattern)


@dataclass(frozen=True)
class Entry:
    """One usable image: its path from the data folder, index of its class, SHA-256 of its bytes, part of the split."""

    name: str
    label: int
    digest: str
    part: Part


@dataclass(frozen=True)
class Scan:
    """A read folder."""

    entries: tuple[Entry, ...]
    report: DataReport


@dataclass(frozen=True)
class _File:
    name: str  # from the data folder, with /
    label: int
    group: str | None
    path: Path | None = None
    packed: PackedImage | None = None


def scan_folder(
    data_dir: Path,
    study: StudyData,
    secret: bytes,
    *,
    on_progress: OnProgress | None = None,
    local: LocalOptions | None = None,
    keep: Callable[[str, UInt8], None] | None = None,
) -> Scan:
    """Read every image of the folder once.

    Args:
        keep: called with the SHA-256 and the decoded image, (channels, height, width), of each distinct usable file.

    Raises:
        DataFolderMissing, UnknownClass, MissingClass, EmptyClass, NotEnoughExamples, GroupUnknown, WrongOption:
            the folder as a whole cannot be used.
    """
    local = local or LocalOptions()
    options = ImageOptions.of(study)
    files, skipped = _candidates(data_dir, study, options, local)
    read: dict[str, _File] = {}
    duplicates: list[tuple[str, str]] = []
    conflicting: dict[str, list[str]] = {}
    for done, file in enumerate(files, 1):
        try:
            digest = _read(file, options.channels, read, keep)
        except UnreadableExample as error:
            skipped.append(Skipped(file.name, error.reason))
        else:
            first = read.setdefault(digest, file)
            if first.label != file.label:
                conflicting.setdefault(digest, [first.name]).append(file.name)
            elif first is not file:
                duplicates.append((file.name, first.name))
        if on_progress is not None:
            on_progress(done, len(files))
    for digest, names in conflicting.items():
        skipped.extend(Skipped(name, "conflicting-labels") for name in names)
        del read[digest]
    entries = tuple(_entry(file, digest, study, secret) for digest, file in read.items())
    _require_enough(entries, study, options)
    groups = len({file.group for file in read.values()}) if _grouped(options, local) else None
    examples = [(entry.label, entry.part, entry.digest) for entry in entries]
    report = DataReport.of(
        "image-folder", study, secret, examples, skipped=skipped, duplicates=duplicates, groups=groups
    )
    return Scan(entries, report)


def decode(content: bytes, channels: int) -> UInt8:
    """Decode a JPEG or PNG to (channels, height, width), 8 bits a channel.

    Raises:
        UnreadableExample: with the reason: empty, too-large, too-many-pixels, corrupt.
    """
    if not content:
        raise UnreadableExample("empty", "The file is empty.")
    if len(content) > MAX_FILE_BYTES:
        raise UnreadableExample("too-large", f"The file is larger than {MAX_FILE_BYTES} bytes.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of sizes that are checked right here
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableExample("too-many-pixels", f"The image has more than {MAX_PIXELS} pixels.")
                return _to_array(image, channels)
    except Image.DecompressionBombError as error:
        raise UnreadableExample("too-many-pixels", f"The image has more than {MAX_PIXELS} pixels.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises for broken files
        raise UnreadableExample("corrupt", "The file is no complete JPEG or PNG image.") from error


def read_image(path: Path, channels: int) -> UInt8:
    """Read and decode one file.

    Raises:
        UnreadableExample: as `decode`, and unreadable where the file cannot be opened.
    """
    return decode(_bytes_of(path), channels)


def _bytes_of(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UnreadableExample("too-large", f"The file is larger than {MAX_FILE_BYTES} bytes.")
        if not path.is_file():
            raise UnreadableExample("unreadable", "This is no regular file.")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableExample("unreadable", "The file cannot be opened; check its permissions.") from error


def _to_array(image: Image.Image, channels: int) -> UInt8:
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip instead of scaling
        wide = np.asarray(image).astype(np.int64) >> SIXTEEN_BIT_SHIFT
        grey = np.clip(wide, 0, 255).astype(np.uint8)
        return np.repeat(grey[None], channels, axis=0)
    if channels == 1:
        return np.asarray(image.convert("L"))[None]
    return np.ascontiguousarray(np.moveaxis(np.asarray(image.convert("RGB")), 2, 0))


def _list_files(
    data_dir: Path,
    study: StudyData,
    folders: Mapping[str, list[Path]],
    group_of: Callable[[str, str], str | None],
) -> tuple[list[_File], list[Skipped]]:
    """All candidate files, in an order that depends on their names alone, and those left out at once."""
    root = data_dir.resolve()
    files: list[_File] = []
    skipped: list[Skipped] = []
    for label, name in enumerate(study.classes):
        for folder in folders[name]:
            if not folder.resolve().is_relative_to(root):
                skipped.append(Skipped(folder.relative_to(data_dir).as_posix(), "link-outside"))
                continue
            for path in walk(folder):
                relative = path.relative_to(data_dir).as_posix()
                if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                    skipped.append(Skipped(relative, "not-an-image"))
                elif not path.resolve().is_relative_to(root):
                    skipped.append(Skipped(relative, "link-outside"))
                else:
                    group = group_of(relative, path.relative_to(folder).as_posix())
                    files.append(_File(relative, label, group, path))
                if len(files) + len(skipped) > MAX_FILES:
                    raise WrongOption(f"{data_dir} holds more than {MAX_FILES} files; split it over several studies.")
    return files, skipped


def _read(file: _File, channels: int, read: Mapping[str, _File], keep: Callable[[str, UInt8], None] | None) -> str:
    """SHA-256 of the file, or of a packed image, which is decoded unless the same bytes were before."""
    pixels = file.packed.pixels if file.packed is not None else None
    content = pixels.tobytes() if pixels is not None else _encoded(file)
    digest = hashlib.sha256(content).hexdigest()
    if digest not in read:
        image = decode(content, channels) if pixels is None else _in_channels(pixels, channels)
        if keep is not None:
            keep(digest, image)
    return digest


def _encoded(file: _File) -> bytes:
    if file.packed is not None and file.packed.encoded is not None:
        return file.packed.encoded
    return _bytes_of(file.path) if file.path is not None else b""


def _in_channels(pixels: UInt8, channels: int) -> UInt8:
    """(1 or 3, h, w) bytes as grey or colour, by the same weights as Pillow's."""
    if len(pixels) == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=0)
    return np.asarray(Image.fromarray(np.moveaxis(pixels, 0, 2)).convert("L"))[None]


def _candidates(
    data_dir: Path, study: StudyData, options: ImageOptions, local: LocalOptions
) -> tuple[list[_File], list[Skipped]]:
    """All candidates: of packed files where there are any, else of the folders of classes."""
    grouping = _grouping(options, local)
    if packed_files(data_dir):
        return _list_packed(data_dir, study, local, grouping), []
    require_unpickled(data_dir)
    folders = class_folders(data_dir, study, local, allow_missing=options.allow_missing_classes)
    return _list_files(data_dir, study, folders, grouping)


def _list_packed(
    data_dir: Path, study: StudyData, local: LocalOptions, group_of: Callable[[str, str], str | None]
) -> list[_File]:
    """The images of packed files, in their order there. Raises DataFolderMissing, UnknownClass."""
    places = {name: place for place, name in enumerate(study.classes)}
    files: list[_File] = []
    for image in read_packed(data_dir, local.subset):
        label = local.class_map.get(image.label, image.label)
        if label not in places:
            raise UnknownClass(
                f"The study has no class {label!r} ({image.name}); its classes are {', '.join(study.classes)}. Map it "
                f"with --class {image.label}=<class of the study>.",
                found=image.label,
                classes=list(study.classes),
            )
        files.append(_File(image.name, places[label], group_of(image.name, image.name), packed=image))
        if len(files) > MAX_FILES:
            raise WrongOption(f"{data_dir} holds more than {MAX_FILES} images; split it over several studies.")
    return files


def _grouped(options: ImageOptions, local: LocalOptions) -> bool:
    return bool(options.group_pattern) or local.groups_csv is not None


def _grouping(options: ImageOptions, local: LocalOptions) -> Callable[[str, str], str | None]:
    """A function from (path in the data folder, path in the class folder) to the patient group."""
    if local.groups_csv is not None:
        table = groups_of_csv(local.groups_csv)
        return lambda relative, _: known_group(table.get(relative), relative, f"listed in {local.groups_csv}")
    if options.group_pattern:
        pattern = _pattern(options.group_pattern)

        def from_name(relative: str, within: str) -> str | None:
            match = pattern.fullmatch(within)
            return known_group(match and match["group"], relative, f"matched by {options.group_pattern!r}")

        return from_name
    return lambda _relative, _within: None


def _pattern(text: str) -> re.Pattern[str]:
    if text.count("{group}") != 1 or text.count("*") > MAX_STARS or len(text) > MAX_PATTERN:
        raise WrongOption(
            f"Option 'group_pattern' needs {{group}} exactly once, at most {MAX_STARS} stars and {MAX_PATTERN} "
            'characters, as in "{group}_*".',
            option="group_pattern",
        )
    escaped = re.escape(text).replace(re.escape("{group}"), "(?P<group>.+?)").replace(re.escape("*"), ".*")
    return re.compile(escaped)


def _entry(file: _File, digest: str, study: StudyData, secret: bytes) -> Entry:
    key = f"group:{file.group}" if file.group is not None else f"content:{digest}"
    part = part_of(secret, key.encode(), study.validation_share, study.heldout_share)
    return Entry(file.name, file.label, digest, part)


def _require_enough(entries: tuple[Entry, ...], study: StudyData, options: ImageOptions) -> None:
    counts = Counter(entry.label for entry in entries)
    empty = [name for label, name in enumerate(study.classes) if not counts[label]]
    if empty and not options.allow_missing_classes:
        raise EmptyClass(
            f"There is no readable image of {', '.join(empty)}. Add JPEG or PNG files, or have the study set the option "
            "allow_missing_classes.",
            classes=empty,
        )
    parts = Counter(entry.part for entry in entries)
    if not all(parts[part] for part in study.needed_parts):
        raise NotEnoughExamples(
            f"{len(entries)} usable images leave {parts['train']} for training and {parts['validation']} for "
            "validation; each needs at least one. Add images (with patient groups: patients).",
            examples=len(entries),
        )
