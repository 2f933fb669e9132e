"""`nestify scan`: what each layer, group of channels and block costs if it is left out."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import typer

from nestify.cli.arguments import AsJson, Settings, complete_recipe
from nestify.cli.flags import with_recipe_flags
from nestify.recipe.level_options import Kind
from nestify.recipe.sources import parse_setting

NOT_USED = ("output", "dtype", "level", "train", "finetune", "augment", "schedule.kind", "schedule.score", "gates")
