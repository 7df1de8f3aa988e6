"""Constants of TensorFlow graphs: frozen GraphDefs and SavedModels, parsed as protocol buffers and never run."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint
from vq4dit_jax.errors import InputError, MissingExtraError

# A layer of this network alone; its name, under any prefix, finds the network in a graph.
_LANDMARK = "mixed_10/tower_2/conv/conv2d_params"
_BATCH_NORM_EPSILON = {
    "BatchNormWithGlobalNormalization": "variance_epsilon",
    "FusedBatchNorm": "epsilon",
    "FusedBatchNormV2": "epsilon",
    "FusedBatchNormV3": "epsilon",
}
# Endings of the names of the network's parameters; a graph has other constants (axes, shapes, image statistics) too.
_PARAMETER = re.compile(r"(conv2d_params|beta|gamma|moving_mean|moving_variance|softmax/weights|softmax/biases)$")


@dataclasses.dataclass(frozen=True)
class Graph:
    """The network's parameters in a graph.

    Attributes:
      checkpoint: their names, as in the original graph, shapes and values.
      batch_norm: name of a batch-norm node -> {"variance_epsilon": float, "scale_after_normalization": bool}.
    """

    checkpoint: Checkpoint
    batch_norm: Mapping[str, Mapping[str, Any]]


def require_tensorflow(path: Any) -> Any:
    try:
        import tensorflow
    except ImportError:
        raise MissingExtraError("tensorflow", "tfgan", f"reading {path}") from None
    return tensorflow


def open_frozen_graph(path: pathlib.Path) -> Graph:
    """A GraphDef with its weights as constants."""
    graph = require_tensorflow(path).compat.v1.GraphDef()
    _parse(graph, path, "a frozen TensorFlow graph (GraphDef)")
    return _select(path, _constants(graph.node), graph.node)


def open_module(handle: str) -> Graph:
    """A TF-Hub module by its address; downloaded, or taken from TF-Hub's cache."""
    try:
        import tensorflow_hub
    except ImportError:
        raise MissingExtraError("tensorflow-hub", "tfgan", f"reading {handle}") from None
    try:
        folder = tensorflow_hub.resolve(handle)
    except Exception as error:  # any exception of the network, the archive or the cache
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{handle}: cannot be fetched: {reason[:200]}") from None
    return open_saved_model(pathlib.Path(folder))


def open_saved_model(folder: pathlib.Path) -> Graph:
    """A SavedModel with the network's parameters as constants, in its graph or a function of it, or as variables."""
    file = folder / "saved_model.pb"
    if not file.is_file():
        raise InputError(f"{folder}: no saved_model.pb in it; a SavedModel's folder is wanted")
    tensorflow = require_tensorflow(folder)
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel()
    _parse(model, file, "a SavedModel")
    graphs = [meta.graph_def for meta in model.meta_graphs]
    scopes = [graph.node for graph in graphs] + [f.node_def for graph in graphs for f in graph.library.function]
    nodes = [node for scope in scopes for node in scope]
    variables = _variables(tensorflow, folder)
    for parameters in (*(_constants(scope) for scope in scopes), variables):
        if any(name.endswith(_LANDMARK) for name in parameters):
            return _select(folder, parameters, nodes)
    raise InputError(
        f"{folder}: neither its graph, nor its {len(scopes) - len(graphs)} functions, nor its {len(variables)} variables"
        f" have the layers of the Inception network of 2015-12-05 (none is named .../{_LANDMARK});"
        " take pytorch-fid's .pth or the frozen graph .pb instead"
    )


def _parse(message: Any, path: pathlib.Path, what: str) -> None:
    from google.protobuf.message import DecodeError

    try:
        message.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise InputError(f"{path}: not readable as {what}: {error}") from None


def _constants(nodes: Iterable[Any]) -> dict[str, Any]:
    """Name -> TensorProto, of the constants that may be parameters."""
    return {n.name: n.attr["value"].tensor for n in nodes if n.op == "Const" and _PARAMETER.search(n.name)}


def _variables(tensorflow: Any, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Name in the program that made them -> value, of a SavedModel's variables."""
    if not (folder / "variables" / "variables.index").is_file():
        return {}
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    try:
        stored = tensorflow.train.load_checkpoint(str(folder / "variables" / "variables"))
        objects = trackable_object_graph_pb2.TrackableObjectGraph()
        if stored.has_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"):
            objects.ParseFromString(stored.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
            keys = {a.full_name: a.checkpoint_key for node in objects.nodes for a in node.attributes}
        else:
            keys = {name: name for name in stored.get_variable_to_shape_map()}
        return {name: stored.get_tensor(key) for name, key in keys.items() if _PARAMETER.search(name)}
    except (tensorflow.errors.OpError, ValueError) as error:
        raise InputError(f"{folder / 'variables'}: not readable: {str(error).splitlines()[0]}") from None


def _select(path: pathlib.Path, parameters: Mapping[str, Any], nodes: Iterable[Any]) -> Graph:
    """The parameters and batch-norm nodes behind the prefix that the landmark has, by their original names."""
    from tensorflow.python.framework import tensor_util

    prefix = next((n.removesuffix(_LANDMARK) for n in parameters if n.endswith(_LANDMARK)), "")
    found = {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
    shapes, values = {}, {}
    for name, value in found.items():
        try:
            values[name] = value if isinstance(value, np.ndarray) else tensor_util.MakeNdarray(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: {name} is not readable as an array: {error}") from None
        shapes[name] = values[name].shape
        if not np.issubdtype(values[name].dtype, np.floating):
            raise InputError(f"{path}: {name} is of type {values[name].dtype}; floating-point weights are wanted")
    batch_norm = {}
    for node in nodes:
        attribute = _BATCH_NORM_EPSILON.get(node.op)
        if attribute and node.name.startswith(prefix):
            scaled = node.attr["scale_after_normalization"].b if "scale_after_normalization" in node.attr else True
            batch_norm[node.name.removeprefix(prefix)] = {
                "variance_epsilon": node.attr[attribute].f,
                "scale_after_normalization": scaled,
            }
    return Graph(Checkpoint(path, shapes, values.__getitem__), batch_norm)
