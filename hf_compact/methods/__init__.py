"""Every method by its name in a recipe. Adding one is a folder and one line here."""

from ..capture import Method
from . import codebook, correction, entropy, nested, pruning, sparsity, tensor_network, ternary

METHODS: dict[str, Method] = {
    "codebook": codebook.METHOD,
    "correction": correction.METHOD,
    "entropy": entropy.METHOD,
    "nested": nested.METHOD,
    "pruning": pruning.METHOD,
    "sparsity": sparsity.METHOD,
    "tensor_network": tensor_network.METHOD,
    "ternary": ternary.METHOD,
}
LAYERS = {name: cls for method in METHODS.values() for name, cls in method.layers.items()}
