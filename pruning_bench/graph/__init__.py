"Coupled channels, heads and blocks; importing it registers the rules of operations, attention included."
from pruning_bench.graph import attention, rules
