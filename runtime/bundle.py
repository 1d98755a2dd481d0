"""A bundle on disk, read: manifest, files checked against it, stage graphs, tokenizer and memory-mapped embeddings.

Every number a deployment needs stands in manifest.json; every file has its size and sha256 there. A folder without a readable
manifest is not a bundle (the manifest is written last). Paths in a manifest may not leave the folder. Writing is export's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engines.cache import CUDA_FORM, graph_hash
from engines.digests import sha256_of
from runtime.contract import CONTRACT_VERSION, STAGES
from runtime.errors import BundleCorrupt, BundleMissing, BundleVersionError, NotCompared
from runtime.masking import MaskRule
from runtime.parity import GATES, Gates
from runtime.preprocess import Preprocessing
from runtime.prompts import PromptEncoder, Prompts

SCHEMA_VERSION = 3
OLDEST_SCHEMA = 1  # before quantisation: what it lacks has defaults
SEALED_SCHEMA = 3  # from which a manifest holds its own sha256
SEAL = "sha256"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
EMBEDDINGS = "embeddings.npy"
GOLDEN = "golden.npz"
PARITY = "parity.json"
UNFINISHED = "unfinished.json"  # stands in a folder that export is still at work on, whatever else is there

WHOLE_NUMBERS = {"preprocessing": ("pixel_size", "semantic_size"), "prompts": ("max_instruction_tokens", "max_new_tokens")}


@dataclass(frozen=True)
class FileRecord:
    """One file of a bundle: size in bytes and sha256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json.

    Attributes:
        model: name of the checkpoint's configuration.
        precision: numeric type of the graphs' arithmetic by stage: fp32, fp16, bf16, or int8 (an encoder's linear layers in 8 bit, the
            rest of it fp32).
        lmm: how the language model's weights are stored: float, int8 or gptq4.
        threshold, relative_threshold: how a mask is cut from a map (runtime.masking); the defaults of a Segmenter, adjustable there.
        fusion_weight: share of the absolute map in the anomaly map (eq. 8), built into the graph and told here.
        sizes: size of each axis of the contract that this checkpoint fixes.
        parity: summary of parity.json, written by export.
        files: every file of the bundle but the manifest, by POSIX path.
        tools: versions of what made the bundle.
        gates: limits that export judged the bundle by (fields of runtime.parity.Gates); empty: those of its precision.
        quantisation: of a bundle with integers: "plan" (sha256, settings, pictures), "layers" (integer layers by name, in words) and
            "kept_float" (layers that the gate put back, with why).
    """

    schema_version: int
    contract_version: int
    model: str
    precision: dict[str, str]
    lmm: str
    preprocessing: Preprocessing
    prompts: Prompts
    threshold: float
    fusion_weight: float
    sizes: dict[str, int]
    parity: dict[str, Any]
    files: dict[str, FileRecord]
    tools: dict[str, str]
    gates: dict[str, Any] = dataclasses.field(default_factory=dict)
    quantisation: dict[str, Any] = dataclasses.field(default_factory=dict)
    relative_threshold: float = 1.0

    @property
    def mask_rule(self) -> MaskRule:
        """How masks are cut from maps."""
        return MaskRule(self.threshold, self.relative_threshold)

    @property
    def integer_weights(self) -> bool:
        """Whether the language model's weights are integers, which an engine may multiply with 8-bit activations."""
        return any(name.startswith("language.") for name in self.quantisation.get("layers", {}))

    def to_json(self) -> str:
        """With the sha256 of all that it says, so that a threshold changed by hand is told."""
        fields = dataclasses.asdict(self)
        if self.schema_version >= SEALED_SCHEMA:
            fields[SEAL] = seal_of(fields)
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST) -> Manifest:
        """Raises BundleCorrupt when it is no manifest or was changed since export, BundleVersionError when it is one of another version."""
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict):
                raise ValueError(f"expected an object, got a {type(fields).__name__}")
            if lacking := [name for name in ("schema_version", "contract_version") if name not in fields]:
                raise ValueError(f"expected {lacking[0]!r} in it, got none")
            versions = int(fields["schema_version"]), int(fields["contract_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise BundleCorrupt(f"{where} is not a bundle manifest ({error}); export the bundle again") from error
        if versions[0] < OLDEST_SCHEMA or versions[0] > SCHEMA_VERSION:
            _check_version("schema", versions[0], SCHEMA_VERSION, where)
        _check_version("contract", versions[1], CONTRACT_VERSION, where)
        seal = fields.pop(SEAL, None)
        try:
            needed = [field.name for field in dataclasses.fields(cls) if field.default is field.default_factory is dataclasses.MISSING]
            if lacking := [name for name in needed if name not in fields]:
                raise ValueError(f"expected {', '.join(map(repr, lacking))} in it, got none")
            for group, names in WHOLE_NUMBERS.items():
                for name in names:
                    if not (isinstance(value := fields[group][name], int) and value > 0):
                        raise ValueError(f"{group}.{name}: expected a whole number above 0, got {value!r}")
            fields["preprocessing"] = Preprocessing(**_tuples(fields["preprocessing"]))
            fields["prompts"] = Prompts(**_tuples(fields["prompts"]))
            fields["files"] = {path: FileRecord(**record) for path, record in fields["files"].items()}
            for name in ("threshold", "relative_threshold", "fusion_weight"):
                if name in fields:
                    fields[name] = float(fields[name])
            MaskRule(fields["threshold"], fields.get("relative_threshold", 1.0))
            Gates(**(fields.get("gates") or dataclasses.asdict(GATES["fp32"])))  # a misspelt one must not pass for none
            if missing := {"L", "H", "C"} - fields["sizes"].keys():
                raise ValueError(f"sizes lacks {', '.join(sorted(missing))}")
            manifest = cls(**fields)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            words = f"expected {error.args[0]!r} in it, got none" if isinstance(error, KeyError) else error
            raise BundleCorrupt(f"{where} does not describe a bundle: {words}; export the bundle again") from error
        if versions[0] >= SEALED_SCHEMA and seal != seal_of(json.loads(text)):
            raise BundleCorrupt(
                f"{where} was changed after export: its sha256 is not that of what it says; copy or export the bundle again, and judge "
                "otherwise by --threshold and --relative-threshold (threshold=, relative_threshold=)"
            )
        return manifest


class Bundle:
    """An opened bundle. Construction checks the manifest and every file's size and sha256.

    Raises:
        BundleMissing: no such folder, no manifest in it, or a file of it is gone.
        BundleCorrupt: a file cannot be read, has another size or content than the manifest says, or a path leaves the folder.
        BundleVersionError: written for another schema or contract.
    """

    def __init__(self, folder: str | Path, *, check_hashes: bool = True, unfinished: bool = False) -> None:
        """`unfinished` opens what export has not ended: export's own way to verify what it wrote."""
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        try:
            if not self.folder.is_dir():
                how = "give the folder that agvas-export wrote"
                if str(folder) == "nano":
                    how = "nano is a checkpoint: agvas-export --checkpoint nano --output bundle makes a bundle of it"
                raise BundleMissing(f"{self.folder} is not a folder; {how}")
            if not manifest.is_file():
                raise BundleMissing(f"{self.folder} has no {MANIFEST}: it is not a bundle, or its export was interrupted; run agvas-export")
            if not unfinished and (self.folder / UNFINISHED).exists():
                raise BundleMissing(f"{self.folder} was not exported to its end; run the same agvas-export again, which goes on with it")
            text = manifest.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(manifest, error) from error
        self.manifest = Manifest.from_json(text, str(manifest))
        self.id = hashlib.sha256(text.encode()).hexdigest()
        for name, record in self.manifest.files.items():
            self._check(name, record, check_hashes)
        for name in (TOKENIZER, EMBEDDINGS, GOLDEN, *(f"{stage}/{stage}.onnx" for stage in STAGES)):
            if name not in self.manifest.files:
                raise BundleCorrupt(f"{manifest} does not list {name}, which every bundle has; export the bundle again")

    def graph(self, stage: str, engine: str = "", device: str = "cpu") -> Path:
        """The stage's .onnx file; its external data lies beside it.

        Args:
            engine, device: that will run it: onnxruntime on CUDA is given the form of the graph with its own operators, where export
                wrote one.
        """
        own = f"{stage}/{stage}{CUDA_FORM}"
        if engine == "onnxruntime" and device != "cpu" and own in self.manifest.files:
            return self.folder / own
        return self.folder / stage / f"{stage}.onnx"

    def graph_hash(self, stage: str) -> str:
        """One hash of a stage's graph and its data, from the manifest: what an engine built of them is filed under."""
        folder, files = f"{stage}/", self.manifest.files
        return graph_hash({name[len(folder) :]: files[name].sha256 for name in files if name.startswith(f"{folder}{stage}.")})

    def prompt_encoder(self) -> PromptEncoder:
        """The checkpoint's prompts over its tokenizer."""
        path = self.folder / TOKENIZER
        try:
            return PromptEncoder(Tokenizer.from_file(str(path)), self.manifest.prompts)
        except Exception as error:  # tokenizers raises bare Exception for a file that is none
            raise BundleCorrupt(f"{path} does not fit the manifest's prompts: {error}; export the bundle again") from error

    def embeddings(self) -> np.ndarray:
        """The token embedding table [V, D], float32 or float16, memory-mapped: a request touches a few dozen rows of it."""
        path = self.folder / EMBEDDINGS
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise _unreadable(path, error) from error

    def golden(self) -> dict[str, np.ndarray]:
        """The reference's traces, see runtime.verify.

        Raises:
            NotCompared: export made none.
            BundleCorrupt: they cannot be read.
        """
        if not self.compared:
            raise NotCompared(
                f"{self.folder} was exported without a comparison (--parity none) and has no golden pictures, by which to verify it or to "
                "choose an engine; export it without --parity none, or run it unverified on an engine that you name"
            )
        path = self.folder / GOLDEN
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except OSError as error:
            raise _unreadable(path, error) from error

    @property
    def compared(self) -> bool:
        """False where export was told not to compare it with the reference."""
        return self.manifest.parity.get("compared") is not False

    @property
    def doubt(self) -> str | None:
        """In words, why its masks may not be the reference's: nobody compared them, or they failed; None where export's gates held."""
        if not self.compared:
            return (
                f"{self.folder} was exported without a comparison (--parity none): nothing says that its masks are the reference's; export "
                "it without --parity none before its verdicts count"
            )
        if not self.manifest.parity.get("passed"):
            return (
                f"{self.folder} failed its comparison with the reference in export and was written all the same (--parity report; "
                f"{PARITY} says what failed): its verdicts may not be the reference's; export it so that its gates hold before they count"
            )
        return None

    @property
    def bytes(self) -> int:
        """Size on disk of all files but the manifest."""
        return sum(record.bytes for record in self.manifest.files.values())

    def _check(self, name: str, record: FileRecord, check_hash: bool) -> None:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name:
            raise BundleCorrupt(f"{MANIFEST} names {name!r}, a path outside the bundle; do not use this bundle")
        path = self.folder / name
        try:
            if not path.is_file():
                raise BundleMissing(f"{path} is missing; copy the bundle again, whole, or run agvas-export")
            size = path.stat().st_size
            if size != record.bytes:
                raise BundleCorrupt(f"{path} has {size} bytes, the manifest says {record.bytes}; copy or export the bundle again")
            if check_hash and sha256_of(path) != record.sha256:
                raise BundleCorrupt(f"{path} was altered: its sha256 is not the manifest's; copy or export the bundle again")
        except OSError as error:
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> BundleCorrupt:
    return BundleCorrupt(f"{path} cannot be read ({error}); check its permissions, or copy the bundle again")


def seal_of(fields: dict[str, Any]) -> str:
    """Hexadecimal sha256 of a manifest's fields but the seal itself, however they are laid out."""
    return hashlib.sha256(json.dumps({name: fields[name] for name in fields if name != SEAL}, sort_keys=True).encode()).hexdigest()


def _check_version(kind: str, found: int, expected: int, where: str) -> None:
    if found > expected:
        raise BundleVersionError(
            f"{where} has {kind} version {found}, this runtime reads {expected}; install a newer agvas, or export with this one"
        )
    if found < expected:
        raise BundleVersionError(
            f"{where} has {kind} version {found}, this runtime reads {expected}; export the bundle again with this agvas"
        )


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
