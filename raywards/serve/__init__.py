"""Reward models on Ray Serve: `serve run raywards.serve:build model=FOLDER`."""

from raywards.serve.app import build, deploy, endpoint, run
from raywards.serve.http import create_app

__all__ = ["build", "create_app", "deploy", "endpoint", "run"]
