#!/usr/bin/env bash
# make demo: render a sequence (or read VIDEO), compute correspondences, train, score against two baselines, draw.
set -eu
SECONDS=0
if [ -n "${VIDEO:-}" ]; then
    NAME=my_$(basename "${VIDEO%.*}")
    SEQ=seqs/$NAME
    $PY -m preprocessing --video "$VIDEO" --data_dir "$SEQ" --short_side 192 --max_frames 48 --resume
else
    NAME=demo
    SEQ=seqs/demo
    $PY -m preprocessing synthetic --data_dir "$SEQ"
    $PY -m preprocessing --data_dir "$SEQ" --resume
fi
$PY train.py --config configs/demo.txt --data_dir "$SEQ"
if [ -z "${VIDEO:-}" ]; then
    $PY eval.py --config configs/demo.txt --data_dir "$SEQ" --annotations "$SEQ/annotations.npz" --query_mode first --baselines static,chain
fi
$PY viz.py --config configs/demo.txt --data_dir "$SEQ"
echo "finished in $SECONDS s; results are in out/demo_$NAME/"
