"""What the doctor can find: names of checks with their remedies, and findings from what reader and ``prepare`` say.

A finding has two texts. ``message`` holds numbers and words of this package only, so that it may stand on a page that
is passed around; ``private`` may quote paths, names of subjects and what a library said of a file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agssd.scans.dicom.planes import TELLS

SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One thing found in one case, or in the set as a whole.

    Attributes:
        check: a key of ``CHECKS``.
        severity: "error" where ``prepare`` refuses the scan, or training with it would fail or be misled; "warning"
            where a look is needed; "info".
        message: one sentence with the value, free of names.
        private: the same with paths and names where they help, or None if there are none.
        argument: of ``prepare`` that lets it take the scan or take it otherwise, such as "--volume"; or None.
    """

    check: str
    severity: str
    message: str
    private: str | None = None
    argument: str | None = None

    @property
    def text(self) -> str:
        """Return the fuller of the two texts, for the terminal and the CSV."""
        return self.private or self.message


@dataclass(frozen=True)
class Check:
    """What stands above all findings of one kind.

    Attributes:
        title: a few words.
        remedy: what to do.
    """

    title: str
    remedy: str


CHECKS = {
    "damaged": Check("Damaged or truncated", "fetch the file again from where it came; until then leave it out"),
    "missing": Check("Named, but not there", "correct the path in the list that names it"),
    "type": Check("File type that is not read", "convert it to NIfTI"),
    "series": Check("DICOM series that is no volume", "export the series again, whole and by itself, or leave it out"),
    "no-scan": Check("Not a scan of anatomy", "nothing: prepare leaves it out"),
    "dimensions": Check("Not one grey 3D volume", "take one of several volumes with --volume I, or leave it out"),
    "non-finite": Check("NaN or infinite voxels", "mend them where the file is made, or leave it out"),
    "constant": Check("Constant image", "leave it out"),
    "values": Check("Values that are no intensities", "look how the file was made; leave it out"),
    "affine": Check(
        "Axes that are no right-angled grid", "let --unshear resample it if they are skewed; else leave it out"
    ),
    "spacing": Check("Implausible spacing", "compare the header's voxel size (mm) with the scanner's protocol"),
    "field-of-view": Check("Implausible field of view", "compare shape and voxel size (mm) with the protocol"),
    "sform-qform": Check("sform and qform disagree", "find out which is right and write it into both"),
    "orientation": Check("Orientation is not stated", "look whether left is left, and write an sform"),
    "mirrored": Check(
        "Stored with the other handedness",
        "legal, and undone by prepare where the header is right; look whether a converter swapped left and right",
    ),
    "modality": Check("Modality in doubt", "say --modality or state it in a manifest; values of a CT must be HU"),
    "clipped": Check("Clipped intensities", "convert again from the original without a window"),
    "grey-levels": Check("Few grey levels", "convert again from the original, not from 8-bit pictures"),
    "foreground": Check("Little or no body", "look at the scan; leave it out if there is no body in it"),
    "flat": Check("No edges", "look at the scan; leave it out if it shows nothing"),
    "anisotropy": Check("Thick slices", "interpolated to the stored spacing; --spacing-mm can keep the slices"),
    "mixed-spacing": Check("Mixed spacings", "choose one --spacing-mm that suits all, or prepare the kinds apart"),
    "label-map": Check("Looks like a label map", "name label files with --labels or in a manifest"),
    "label-file": Check("Label cannot be read", "fetch or mend the label, or list the scan without it"),
    "label-grid": Check("Label on another grid", "resample the label to its image, or pair it with the right one"),
    "label-empty": Check("Empty label", "draw it, or list the scan without a label"),
    "label-outside": Check(
        "Label outside the body", "look whether label and image belong together and are not flipped"
    ),
    "label-values": Check("Unexpected label values", "correct the label, or name all values with --label-values"),
    "channel-grid": Check("Channels on different grids", "resample the channels to one grid"),
    "duplicate": Check("Same bytes twice", "keep one of them"),
    "near-duplicate": Check("Nearly the same image", "keep one, or give both the same subject (--subject)"),
    "subject": Check("Many scans of one subject", "check --subject: a wrong expression joins different people"),
    "split": Check("Splits", "give every subject one split, and train, val and test some subjects"),
    "class-balance": Check("Class balance", "collect more of the rare class, or weigh it in training"),
    "not-used": Check("Listed, but not used", "change the list or the arguments so that the file is used once"),
    "note": Check("Remarks of the reader", "nothing, if the remark is right"),
    "refused": Check("Refused for another reason", "see findings.csv for the reason"),
    "memory": Check("Not enough memory", "use fewer --workers or a machine with more memory"),
    "cache": Check("Cache cannot be opened", "build it again"),
    "decode": Check("Array cannot be decoded", "build the cache again, or copy it again"),
    "index": Check("Index and arrays disagree", "build the cache again"),
    "constants": Check("Impossible constants", "build the cache again"),
    "channels": Check("Different numbers of channels", "prepare one cache for each number of channels"),
}

_NUMBER = r"[-+]?[\d.]+(?:e[-+]?\d+)?"
_SHAPE = r"\d+(?:x\d+)*"
_OBJECTS = (  # in DICOM beside scans
    "localiser|projection|Siemens mosaic|screen dump|secondary capture|derived image|radiograph|mammogram|"
    "intra-oral radiograph|structured report|segmentation|surface segmentation|label map segmentation|"
    "presentation state|parametric map|spatial registration|deformation field|encapsulated document|"
    "radiotherapy object|radiotherapy image|radiotherapy dose|radiotherapy plan|key object selection|waveform|"
    "value mapping|surface scan|photograph|table of values"
)
_DAMAGES = (  # as gzip, zlib, nibabel and the reader say it, without what they quote
    r"CRC check failed(?: \w+ != \w+)?|Incorrect length of data produced|its data end too early|"
    r"Compressed file ended before the end-of-stream marker was reached|Error -\d+ while decompressing data|"
    r"Not a gzipped file|Expected \d+ bytes, got \d+ bytes"
)
_TOLD_APART = "|".join(TELLS)
_REASONS = (
    (r"empty file", "damaged"),
    (rf"truncated or damaged(?:: (?:{_DAMAGES}))?", "damaged"),
    (r"no NIfTI file(?:: its header does not begin with its size)?", "damaged"),
    (r"no valid NIfTI header|its header cannot be read", "damaged"),
    (r"cut off within its header: \d+ bytes, of which the header alone takes \d+", "damaged"),
    (r"a NIfTI or Analyze header without its \.img|an \.img without its \.hdr", "damaged"),
    (r"the data file that its header names is missing", "damaged"),
    (r"cannot be opened|no regular file|this folder cannot be listed", "missing"),
    (r"\d+ (?:voxels|pixels) are (?:NaN or infinite|NaN|infinite)", "non-finite"),
    (rf"all voxels are 0|constant: all (?:voxels|pixels) are {_NUMBER}|constant at this spacing", "constant"),
    (rf"values from {_NUMBER} to {_NUMBER} are no intensities", "values"),
    (rf"\dD image \({_SHAPE}\)(?:; --volume (?:I \(from 0\) takes one|\d+ is none) of its \d+ volumes)?", "dimensions"),
    (rf"single slice \({_SHAPE}\)|an empty image of shape {_SHAPE}", "dimensions"),
    (r"a colour image|\d+ values per voxel|complex voxels|a sequence of tracked 2D frames", "dimensions"),
    (rf"\d+ volumes in one series(?: \((?:{_TOLD_APART})(?: and (?:{_TOLD_APART}))?)?", "dimensions"),
    (r"\d+ frames without a place for each|voxels of type(?: [a-z]+\d* are not read)?", "dimensions"),
    (r"its affine has NaN or infinite entries", "affine"),
    (r"its affine is degenerate(?:: the spacing along axis \d is 0|: the axes do not span space)?", "affine"),
    (rf"sheared affine: two axes are {_NUMBER} degrees off a right angle", "affine"),
    (rf"its spacing of {_NUMBER} x {_NUMBER} x {_NUMBER} mm is outside {_NUMBER} to {_NUMBER} mm", "spacing"),
    (rf"its field of view of {_NUMBER} x {_NUMBER} x {_NUMBER} mm is larger than any body", "field-of-view"),
    (rf"{_SHAPE} voxels at this spacing are too (?:many|thin)", "spacing"),
    (r"looks like a label map|a BIDS label map", "label-map"),
    (rf"values {_NUMBER} to {_NUMBER} are not HU|CT without RescaleSlope and RescaleIntercept", "modality"),
    (r"its header says (?:ct|mri), (?:--modality says (?:ct|mri)|line \d+ of the manifest (?:ct|mri))", "modality"),
    (r"no body found: no voxel is above -500 HU", "foreground"),
    (rf"its label FILE has shape {_SHAPE}, the image has {_SHAPE}", "label-grid"),
    (rf"its label FILE lies up to {_NUMBER} voxels off the image in space", "label-grid"),
    (r"its label FILE holds values that are no integers", "label-values"),
    (rf"its label FILE holds values below 0, down to {_NUMBER}", "label-values"),
    (rf"its label FILE holds values above 32767, up to {_NUMBER}", "label-values"),
    (rf"its channel FILE has shape {_SHAPE}, the image has {_SHAPE}", "channel-grid"),
    (rf"its channel FILE lies up to {_NUMBER} voxels off the image in space", "channel-grid"),
    (r"named twice|its name does not match|its path does not match", "not-used"),
    (r"matches --labels, but no image of its name or on its grid lies beside it", "not-used"),
    (r"not enough memory", "memory"),
    (r"Analyze 7\.5 has no orientation", "type"),
    (r"files of type", "type"),
    # Frames
    (r"damaged, or of a compression that is not decoded", "damaged"),
    (rf"frames of {_SHAPE} pixels|an animated picture|\dD image, which is no sequence of frames", "dimensions"),
    (r"a volume: nothing in its header says that its third axis is time|\d+ values per pixel", "dimensions"),
    (r"frames are read from one file, which holds all channels", "dimensions"),
    (r"its header names another modality than ultrasound", "modality"),
    (rf"no sector found: {_NUMBER} % of the picture could be tissue", "foreground"),
    (rf"its pixels have no size in mm|{_SHAPE} pixels at this spacing are too few", "spacing"),
    # DICOM
    (r"(?:no readable|damaged|no valid) DICOM header|no pixel data", "damaged"),
    (r"(?:truncated|damaged) pixel data(?:: \d+x\d+ pixels decoded)?", "damaged"),
    (r"unsupported transfer syntax", "type"),
    (r"no DICOM image|a folder without DICOM files", "type"),
    (r"duplicate slices: \d+ (?:files repeat an image of the series|of \d+ positions hold up to \d+ images)", "series"),
    (
        rf"missing slices: a gap of {_NUMBER} mm after slice \d+ of \d+(?: \(the first of \d+ such gaps\))?"
        rf"(?:, where others are {_NUMBER} mm apart)?",
        "series",
    ),
    (
        rf"variable slice distance: {_NUMBER} to {_NUMBER} mm"
        rf"(?:, {_NUMBER} mm in the median; {_NUMBER} mm after slice \d+ of \d+)?",
        "series",
    ),
    (r"one slice only", "series"),
    (rf"slices shifted sideways: one lies {_NUMBER} mm off the line of the others", "series"),
    (rf"mixed matrix sizes(?:: \d+ of {_SHAPE}(?:, \d+ of {_SHAPE})*)?", "series"),
    (rf"mixed pixel spacing(?:: {_NUMBER}x{_NUMBER} to {_NUMBER}x{_NUMBER} mm in one series)?", "series"),
    (r"mixed orientations: \d+ in \d+ slices", "series"),
    (r"a folder of \d+ DICOM series|\d+ (?:patients|modalities) in one series", "series"),
    (r"missing position|missing pixel spacing|its ImageOrientationPatient is not two unit vectors", "series"),
    (r"its ImagePositionPatient is not three numbers|its RescaleSlope is 0", "series"),
    (rf"its pixel spacing is {_NUMBER} x {_NUMBER} mm", "spacing"),
    (rf"gantry tilt: slices are stacked {_NUMBER} degrees off their normal", "affine"),
    (r"a BIDS field map|the (?:phase|real part|imaginary part) of a complex image by its BIDS name", "no-scan"),
    (r"a PET scan by its BIDS name|inverted grey values|PET, which is taken only with --pet", "no-scan"),
    (rf"an? (?:{_OBJECTS})\b", "no-scan"),
    (r"MR spectroscopy|ultrasound|nuclear medicine|raw data|3D X-ray|X-ray angiography|tractography", "no-scan"),
)
_ARGUMENT = r"--(?:volume|unshear|pet|spacing-mm|modality)\b"
_NAMING = (  # reasons that quote names, and what the page says instead
    (r".* listed in .*, but missing", "missing", "Listed, but missing."),
    (r".* has a label already", "not-used", "Its image has another label already."),
    (r"[\w/ .]+ is not read; convert it to NIfTI", "type", "A type of file that is not read."),
    (r"CT in .*, not in HU", "modality", "A CT whose values are not in HU."),
)
_NOTES = (
    (r"sform and qform differ in handedness", "sform-qform", "error"),
    (rf"sform and qform disagree by up to {_NUMBER} mm", "sform-qform", "warning"),
    (r"the qform is invalid; the sform is used", "sform-qform", "info"),
    (r"the header gives no orientation \(sform and qform codes 0\)", "orientation", "warning"),
    (r"the header names no space", "orientation", "info"),
    (r"\d+ files of its series or folder could not be used; the volume may be short of slices", "series", "warning"),
    (r"\d+ files repeat an image of the series byte for byte and are left out", "duplicate", "info"),
    (r"other files of its folder hold the same image, by its UID, in other bytes", "duplicate", "warning"),
    (rf"axes {_NUMBER} degrees off a right angle are (?:resampled|taken as right-angled)", "affine", "info"),
    (r"lengths in the header are in (?:meter|micron); converted to mm", "note", "info"),
    (r"its (?:pixels have no size in mm|regions differ in scale)[:;] lengths are in pixels", "note", "info"),
    (r"mirrored, so that columns run to the marked side|turned upside down, so that rows run away", "note", "info"),
    (r"the value 255 of its label is taken for class 1", "note", "info"),
)


def refusal(reason: str, paths: Sequence[Path] = ()) -> Finding:
    """Return the finding of a scan that ``prepare`` refuses.

    Args:
        reason: as ``prepare`` says it.
        paths: of the scan and its label, which the reason may quote.
    """
    plain = reason
    for path in sorted((str(path) for path in paths), key=len, reverse=True):
        plain = plain.replace(path, "FILE")
    plain = re.sub(r"^(?:DICOM file|series of \d+ DICOM files|\d+ DICOM files): ", "", plain)
    named = re.search(_ARGUMENT, plain)
    argument = named.group(0) if named else None
    for pattern, check in _REASONS:
        if match := re.match(pattern, plain):
            return Finding(check, "error", _sentence(match.group(0).replace("FILE", "file")), reason, argument)
    for pattern, check, message in _NAMING:
        if re.match(pattern, plain):
            return Finding(check, "error", message, reason)
    if plain.startswith("its label FILE: "):
        inner = refusal(plain.removeprefix("its label FILE: "))
        check = "label-empty" if inner.check == "constant" else "label-file"
        argument = argument if argument == "--unshear" else None  # the others are for images
        return Finding(check, "error", f"Its label: {inner.message[0].lower()}{inner.message[1:]}", reason, argument)
    return Finding("refused", "error", "Refused; the reason stands in findings.csv.", reason)


def note(text: str) -> Finding:
    """Return the finding of a note that the reader made."""
    for pattern, check, severity in _NOTES:
        if match := re.match(pattern, text):
            return Finding(check, severity, _sentence(match.group(0)), text)
    return Finding("note", "info", "The reader has a remark; it stands in findings.csv.", text)


def merged(found: Sequence[Finding]) -> list[Finding]:
    """Return findings of one case with those of the same check made one, of the gravest severity and with all texts."""
    groups: dict[str, list[Finding]] = {}
    for finding in found:
        groups.setdefault(finding.check, []).append(finding)
    return [items[0] if len(items) == 1 else _as_one(items) for items in groups.values()]


def _as_one(items: Sequence[Finding]) -> Finding:
    items = sorted(items, key=lambda item: SEVERITIES.index(item.severity))
    message, text = (
        " ".join(dict.fromkeys(part if part.endswith(".") else f"{part}." for part in parts))
        for parts in ([item.message for item in items], [item.text for item in items])
    )
    return replace(items[0], message=message, private=None if text == message else text)


def _sentence(text: str) -> str:
    text += ")" * (text.count("(") - text.count(")"))  # where a match ends within brackets
    return text[0].upper() + text[1:] + "."
