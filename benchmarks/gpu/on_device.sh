#!/usr/bin/env bash
# Runs one part of what wants an accelerator, on a machine that may have no registry at hand:
#
#     bash benchmarks/gpu/on_device.sh check|cost|wide-deep [further arguments]
#
# What it finds goes into the folder $OUT. The package need not be installed: what `make wheels` has
# left in build/wheels is unpacked beside the Python that is there (PYTHON, or python3).
set -euo pipefail
cd "$(dirname "$0")/../.."

part=${1:?check, cost or wide-deep}
shift
out=${OUT:-build/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G 'build/wheels/*.whl' > /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" build/wheels/*.whl
fi
export PYTHONPATH=$PWD:$site PYTHONUNBUFFERED=1 # the tree's own code goes before the wheel's

# Interrupted, not killed: what is finished by then is written.
within() {
    timeout --kill-after=20 --signal=INT "$@"
}

case $part in
    check | cost)
        within 260 "$python" -m benchmarks.gpu "$part" --output "$out/$part.json" "$@" 2>&1 |
            tee "$out/$part.log"
        ;;
    wide-deep)
        cache=build/gpu/cache # kept for the next call, where there is one
        status=0
        within 450 "$python" -m benchmarks.harmful_finetuning run recommended \
            --config benchmarks/gpu/wide_deep.json --seeds 0 --workers 1 \
            --methods sft booster booster_warmed booster_recommended \
            --cache "$cache" --output build/gpu/wide_deep "$@" 2>&1 |
            tee "$out/wide_deep.log" || status=$?
        mkdir -p "$cache" build/gpu/wide_deep
        find "$cache" -maxdepth 1 -name 'run-*.json' -exec cp {} build/gpu/wide_deep/ \;
        tar --create --gzip --file "$out/wide_deep.tar.gz" --directory build/gpu wide_deep
        exit "$status"
        ;;
    *)
        echo "no part is called $part: check, cost or wide-deep" >&2
        exit 2
        ;;
esac
