# Sourced by the other scripts: makes .venv with pinned dependencies, once per change of the pins.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp="$(cat constraints.txt setup.cfg | sha256sum | cut -d' ' -f1)"
if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
  echo "setting up .venv (a few minutes the first time)"
  "${PYTHON:-python3}" -m venv --clear .venv
  .venv/bin/pip install --quiet --upgrade pip setuptools wheel
  .venv/bin/pip install --quiet --constraint constraints.txt torch==2.13.0
  .venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev,docs,eval]'
  echo "$stamp" > .venv/stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
