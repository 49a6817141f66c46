"Numbers of an entry that several tests build on."
SIZE = {"mask_density": .5, "params": 100, "prunable": 90, "nonzero": 50, "nonzero_prunable": 45, "macs": 1000,
        "nonzero_macs": 500, "bytes": 400, "bytes_sparse": 230}
COST = {"prune_seconds": .1, "recover_seconds": .2, "peak_bytes": None, "forward": 1, "backward": 0, "samples": 8,
        "recover_steps": 60, "joules": None}
TIMES = {"min": .9, "p50": 1., "p90": 1.1, "stable": True, "speedup": 1.5, "low": 1.4, "high": 1.6}
SPEED = {"device": "cpu", "threads": 1, "rounds": 15, "dense": {**TIMES, "speedup": 1.}, "pruned": TIMES}

# cells of a benchmark notebook that know its parameters: they make a valid entry
ENTRY_CODE = f"\nSIZE, COST = {SIZE}, {COST}\n" + """
run = {"sparsity": .5, "seed": 0, "status": "ok", "message": None, "plan": None, "size": SIZE, "cost": COST,
       "speed": None, "code": None, "quality": {"after_prune": {"accuracy": .5}, "after_recover": None}}
entry = {"schema": "entry.v3", "runs": [run],
         "task": {"name": task, "digest": "0" * 64, "track": "cnn", "metric": "accuracy", "higher": True},
         "method": {"name": method, "variant": variant, "settings": settings, "config": {}, "family": "weight",
                    "stage": "trained", "paper": "p", "year": 1},
         "dense": [{"seed": 0, "quality": {"accuracy": .9}, "size": run["size"], "train_seconds": None}],
         "provenance": dict.fromkeys(["package", "notebook", "python", "libraries", "device", "threads", "date"])}
"""
