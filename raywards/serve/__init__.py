"""Reward models on Ray Serve: `serve run raywards.serve:build model=FOLDER`."""

from raywards.serve.app import build, create_app, deploy, endpoint, run

__all__ = ["build", "create_app", "deploy", "endpoint", "run"]
