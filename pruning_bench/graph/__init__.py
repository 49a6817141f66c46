"Tracing, coupled channels and heads, removal and budgets; importing it registers the rules of operations."
from pruning_bench.graph import attention, model_configs, rules, rules_layers, rules_shape
