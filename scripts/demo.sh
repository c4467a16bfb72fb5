#!/usr/bin/env bash
# make demo: render a sequence, compute correspondences, train, score against two baselines, draw.
set -eu
SECONDS=0
SEQ=seqs/demo
$PY -m preprocessing synthetic --data_dir $SEQ
$PY -m preprocessing --data_dir $SEQ --resume
$PY train.py --config configs/demo.txt --data_dir $SEQ
$PY eval.py --config configs/demo.txt --data_dir $SEQ --annotations $SEQ/annotations.npz --query_mode first --baselines static,chain
$PY viz.py --config configs/demo.txt --data_dir $SEQ
echo "finished in $SECONDS s; results are in out/demo_demo/"
