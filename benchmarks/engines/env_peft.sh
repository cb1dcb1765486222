#!/bin/sh
# steer2edit with transformers and PEFT, from this checkout: env_peft.sh FOLDER
set -e
python3 -m venv "$1"
"$1/bin/pip" install -q "$(dirname "$0")/../..[gguf,test]"
"$1/bin/python" -c "import peft, transformers; print('peft', peft.__version__, 'transformers', transformers.__version__)"
