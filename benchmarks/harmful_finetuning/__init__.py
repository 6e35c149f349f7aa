"""The paper's experiments: defenses against harmful fine-tuning, side by side.

The flow of a run, a module for each part: `data` (from `language` or `files`), `pretrain` or any
model of `models`, `align` and `attack` (around `methods`, by `training`), `score`. Around it:
`settings` and `presets` say how, `experiments` what, `runs` keeps and shares the work under the
names of `keys`, `results` holds what is published, and `tables`, `figures` and `page` show it.
"""
