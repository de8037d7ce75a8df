set -u
mkdir -p /tmp/iso/vlprune; R=$PWD; cd /tmp/iso
touch vlprune/__init__.py; ln -sf $R/vlprune/errors.py vlprune/errors.py; ln -sf $R/vlprune/ops.py vlprune/ops.py; ln -sfn $R/kernels vlprune/kernels; ln -sfn $R/tests tests; cp $R/pyproject.toml .
export PYTHONPATH=/tmp/iso PYTHONUNBUFFERED=1
M=vlprune.kernels.benchmarks
T0=$(date +%s)
for g in attention_rows received_attention gather greedy token_entropy indexed_decode; do timeout 20 python3 -m $M.run --only $g > $OUT/c_$g.txt 2>&1 & done
wait
cat $OUT/c_*.txt > $OUT/compile.log; rm $OUT/c_*.txt
timeout 30 python3 -m $M.run --out $OUT/results.md > $OUT/bench.log 2>&1; tail -n 3 $OUT/bench.log | cut -c1-200
