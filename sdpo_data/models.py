"""A causal language model by name: load it, save it, and know it by its weights."""

import hashlib
import importlib.metadata
import json
import logging
import math
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sdpo_data import workers
from sdpo_data.assets import cache_folder, model_folder
from sdpo_data.run import write_atomically
from sdpo_data.tables import SdpoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SAFETENSORS_DTYPES = {  # torch's name -> the name in a safetensors header
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
NOT_NUMBERS = (  # parts of a config that do not change what the model computes
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def load_model(
    name: str | Path, dtype: str = "float32", device_map: "dict[str, Any] | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a causal LM and its tokenizer, in eval mode, on the GPU if there is one.

    Of several processes each has its own GPU. A single process spreads a model that is larger than
    one GPU's free memory over all of them, and over the CPU.

    Args:
        name: folder, hub id, or embedded:NAME.
        dtype: of the weights in memory: float32, bfloat16 or float16.
        device_map: where to put which module, as accelerate has it; None to decide as above.

    Raises:
        SdpoError: there is no such model, it is not one that can be loaded safely, or some of its
            weights are not in its files (transformers would draw them at random).
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    folder = model_folder(str(name))
    transformers.utils.logging.disable_progress_bar()
    device = f"cuda:{workers.local_rank()}" if torch.cuda.is_available() else "cpu"
    too_large = workers.count() == 1 and torch.cuda.is_available() and _size(folder, dtype) > _free_memory(device)
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            device_map=device_map or ("auto" if too_large else None),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        tokenizer = load_tokenizer(folder)
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise SdpoError(f"Model {name} cannot be loaded from {folder}: {' '.join(str(error).split())[:300]}") from error
    if missing := sorted(report["missing_keys"]):
        raise SdpoError(
            f"Model {name} lacks {len(missing)} of the weights of a {type(model).__name__}, e.g. {missing[0]}. "
            f"Is {folder} complete, and a causal language model?"
        )
    return (model if hasattr(model, "hf_device_map") else model.to(device)).eval(), tokenizer


def _size(folder: Path, dtype: str) -> float:
    """Bytes of a folder's weights in another dtype, with a tenth for what a forward pass needs."""
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    tensors = [tensor for path in folder.glob("*.safetensors") for tensor in _header(path).values()]
    return 1.1 * width * sum(math.prod(tensor["shape"]) for tensor in tensors)


def _free_memory(device: str) -> int:
    import torch

    return torch.cuda.mem_get_info(device)[0]


def load_tokenizer(name: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model, without the model; needs no torch."""
    import transformers

    folder = model_folder(str(name))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if tokenizer is None:
        raise SdpoError(f"Model {name} has no tokenizer in {folder}. Save one beside its weights.")
    return tokenizer


def stated_length(model: "PreTrainedModel") -> int | None:
    """Longest text a model was made to read, tokens, as its config states it; None where it does not."""
    config = model.config.get_text_config()
    stated = (getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
    return next((int(length) for length in stated if length is not None), None)


def reading_length(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Longest text a model was made to read, tokens, with what is assumed where its config states none.

    Source: `HFLM.max_length` of lm-eval 0.4.13.
    """
    if (length := stated_length(model)) is not None:
        return length
    return tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else 2048  # unset is 10^30


def save_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Save weights (sharded safetensors, in the dtype they have), config and tokenizer in `folder`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_key(model: "PreTrainedModel | Path | str") -> str:
    """Name a model by what it computes: the same for a folder and for the model loaded from it.

    A hash over the sorted (name, dtype, shape, bytes) of its tensors and its config. Matrices of
    equal content count once, under the last of their names: so tied weights give one key whether
    or not both are in the file. Live and saved keys agree in the same dtype.

    Args:
        model: loaded model, folder, hub id or embedded:NAME. Folders are read without torch.

    Raises:
        SdpoError: there is no such folder, or its files cannot be read.
    """
    if isinstance(model, str | Path):
        return _key_of_folder(model_folder(str(model)))
    tensors = (
        (name, SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), _bytes(tensor))
        for name, tensor in model.state_dict().items()
    )
    return _key(model.config.to_diff_dict(), tensors)


def _key(config: dict[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...], Any]]) -> str:
    names: dict[tuple, str] = {}
    for name, dtype, shape, content in tensors:
        alone = name if len(shape) < 2 else ""  # vectors are not tied, but norms of ones are equal
        same = (dtype, shape, xxhash.xxh3_128_hexdigest(content), alone)
        names[same] = max(name, names.get(same, ""))
    numbers = {key: value for key, value in config.items() if key not in NOT_NUMBERS}
    rows = sorted([name, *same[:3]] for same, name in names.items())
    return hashlib.sha256(json.dumps([numbers, rows], sort_keys=True, default=str).encode()).hexdigest()[:32]


def _key_of_folder(folder: Path) -> str:
    """Read the key of a folder's files, or remember it from the last time these very files were read."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    stamp = json.dumps([importlib.metadata.version("transformers"), stats])
    memo = cache_folder() / "model_keys" / hashlib.sha256(stamp.encode()).hexdigest()
    if not memo.exists():
        try:
            key = _key(_config_of_folder(folder), _tensors_of_folder(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SdpoError(f"Model {folder} cannot be read: {' '.join(str(error).split())[:300]}") from error
        write_atomically(memo, lambda temporary: temporary.write_text(key))
    return memo.read_text()


def _config_of_folder(folder: Path) -> dict[str, Any]:
    import transformers

    return transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    ).to_diff_dict()


def _tensors_of_folder(folder: Path) -> Iterable[tuple[str, str, tuple[int, ...], memoryview]]:
    """Read the safetensors files' headers and map their tensors: no torch, nothing copied."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            with memoryview(content) as view:
                for name, tensor in header.items():
                    if name != "__metadata__":
                        begin, end = (8 + size + offset for offset in tensor["data_offsets"])
                        with view[begin:end] as part:
                            yield name, tensor["dtype"], tuple(tensor["shape"]), part


def _header(path: Path) -> dict[str, Any]:
    """Read a safetensors file's header: name -> dtype, shape, offsets."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def _bytes(tensor: Any) -> Any:
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
