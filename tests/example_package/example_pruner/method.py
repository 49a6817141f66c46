"A method with a score of its own."
from torch import Tensor

from pruning_bench import Method, register
from pruning_bench.core.allocate import global_
from pruning_bench.core.score import score


@score()
def centred_magnitude(w: Tensor, # (rows, columns)
                      stats,     # unused
                      )->Tensor: # like w
    "Absolute difference from the mean of the row."
    return (w - w.mean(1, keepdim=True)).abs()


@register("An example of a method in a package of its own", "folklore", 2025, "weight")
def centred():
    "Weights nearest to the mean of their row are removed, in one ranking of the whole network."
    return Method(score=centred_magnitude, allocate=global_)
