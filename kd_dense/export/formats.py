"""Write a network as TorchScript or ONNX, and run what was written."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_dense.errors import ConfigError

#: Key of our description in the metadata of an ONNX file, and name of the file in a TorchScript archive.
METADATA = 'kd_dense'
#: The newest operator set that current runtimes all read, and that has all that the toolboxes' models need.
OPSET = 17

#: Image batch ``[N, 3, H, W]`` float32 -> outputs in order.
Runnable = Callable[[Tensor], list[Tensor]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what tracing always says about toolbox code; whether it matters is found by comparing outputs."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', category=torch.jit.TracerWarning)
        warnings.filterwarnings('ignore', message=r'`torch\.jit\.\w+` is (deprecated|not supported)')
        warnings.filterwarnings('ignore', message='You are using the legacy TorchScript-based ONNX export')
        warnings.filterwarnings('ignore', message='The feature will be removed', category=DeprecationWarning)
        warnings.filterwarnings('ignore', message='torch.meshgrid: in an upcoming release')
        yield


@contextlib.contextmanager
def _no_stdout() -> Iterator[None]:
    """Close standard output to the ONNX exporter, which prints the whole network when it fails."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def write(
    network: nn.Module,
    example: Tensor,
    names: Sequence[str],
    path: Path,
    format: str,
    metadata: Mapping[str, Any],
    dynamic: str | None = None,
    opset: int | None = None,
) -> None:
    """Write ``network`` to ``path``.

    Args:
        network: image batch -> tuple of tensors.
        example: ``[1, 3, H, W]``, the input it is traced with.
        names: of its outputs.
        format: ``'torchscript'`` or ``'onnx'``.
        metadata: plain data that goes into the file.
        dynamic: ONNX: leave the ``'batch'`` size open, or ``'all'``: height and width too.
        opset: ONNX operator set; default: :data:`OPSET`.

    Raises:
        ConfigError: the network has something that the format can not hold.
    """
    try:
        with quiet(), torch.no_grad():
            if format == 'torchscript':
                traced = torch.jit.trace(network, example, check_trace=False, strict=False)
                torch.jit.save(traced, str(path), _extra_files={METADATA: json.dumps(metadata)})
            else:
                _write_onnx(network, example, names, path, metadata, dynamic, opset or OPSET)
    except ConfigError:
        raise
    except Exception as error:  # the exporters raise under many types, for many reasons
        reason = (str(error).strip().splitlines() or [''])[0][:300]
        raise ConfigError(
            f'--format {format}: this student can not be exported ({type(error).__name__}: {reason}); export it with '
            + ('--format torchscript, or ' if format == 'onnx' else '')
            + '--format pth, and from that with MMDeploy'
        ) from error


def _write_onnx(
    network: nn.Module,
    example: Tensor,
    names: Sequence[str],
    path: Path,
    metadata: Mapping[str, Any],
    dynamic: str | None,
    opset: int,
) -> None:
    onnx = _import('onnx')
    axes = None
    if dynamic is not None:
        # Of an output only the batch is named: what its other dimensions are is up to the network.
        axes = {name: {0: 'batch'} for name in ('image', *names)}
        if dynamic == 'all':
            axes['image'].update({2: 'height', 3: 'width'})
    # The newer exporter (dynamo=True) needs onnxscript, and fails on the data samples of the toolboxes.
    with _no_stdout():
        torch.onnx.export(
            network,
            (example,),
            str(path),
            input_names=['image'],
            output_names=list(names),
            dynamic_axes=axes,
            opset_version=opset,
            dynamo=False,
        )
    model = onnx.load(str(path))
    model.producer_name = 'kd_dense'
    model.metadata_props.add(key=METADATA, value=json.dumps(metadata))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def load(path: Path, format: str) -> Runnable:
    """What was written, ready to run on the CPU: TorchScript by torch, ONNX by onnxruntime.

    Raises:
        ConfigError: the file has an operator that onnxruntime does not.
    """
    if format == 'torchscript':
        with quiet():
            network = torch.jit.load(str(path), map_location='cpu')

        def run(batch: Tensor) -> list[Tensor]:
            with torch.no_grad(), quiet():
                outputs = network(batch)
            return [outputs] if isinstance(outputs, Tensor) else list(outputs)

        return run
    runtime = _import('onnxruntime')
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong arrives as an exception
    try:
        session = runtime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    except Exception as error:  # onnxruntime raises under types of its own
        reason = str(error).strip().rpartition('failed:')[2][:200]
        raise ConfigError(
            f'--format onnx: onnxruntime can not run what was exported ({reason}); export it with --format pth, and '
            'from that with MMDeploy, which brings the operators of mmcv'
        ) from error
    name = session.get_inputs()[0].name
    return lambda batch: [torch.from_numpy(output) for output in session.run(None, {name: batch.numpy()})]


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--format onnx: {error.name} is not installed; pip install 'kd_dense[export]'") from None
