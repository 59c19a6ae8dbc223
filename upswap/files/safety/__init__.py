"""What a stranger's file may do: which names it may use, what it may call, how much memory and time it may take.

`pickle_scan` reads the instructions of a pickle before anything runs: `pickled_calls` judges what they call, `pickle_walks`
how long going through the values takes. `allowed_names` judges the classes it names and `stand_ins` has what it gets for
them. `judgement` looks at what it made of these, by the rules in `instance_rules`, and makes it real. `value_forms` has the
values that are pickled as calls. `memory_limit` bounds what a description may build, `time_limit` the whole load.
"""
