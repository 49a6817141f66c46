"A method and a task for pruning_bench, found through entry points."
