#!/bin/sh
# mlx-lm in an environment of its own, on Linux with MLX's engine for CPUs: env_mlx.sh FOLDER
set -e
python3 -m venv "$1"
case $(uname) in Darwin) mlx=mlx ;; *) mlx="mlx[cpu]" ;; esac
"$1/bin/pip" install -q "$mlx" mlx-lm
"$1/bin/python" -c "from importlib.metadata import version; print('mlx', version('mlx'), 'mlx-lm', version('mlx-lm'))"
