set -u
mkdir -p /tmp/iso/vlprune; R=$PWD; cd /tmp/iso
touch vlprune/__init__.py; ln -sf $R/vlprune/errors.py vlprune/errors.py; ln -sf $R/vlprune/ops.py vlprune/ops.py; ln -sfn $R/kernels vlprune/kernels; ln -sfn $R/tests tests; cp $R/pyproject.toml .
export PYTHONPATH=/tmp/iso PYTHONUNBUFFERED=1
T0=$(date +%s)
for t in attention_rows received_attention gathers max_min greedy_dpp token_entropy indexed_decode compile_and_capture dispatch; do
  timeout 90 python3 -m pytest tests/kernels/test_$t.py -q -p no:cacheprovider --durations=4 > $OUT/test_$t.txt 2>&1 &
done
for g in ar_big ar_mid ar_small ra,te mm1,mm2 dp de gt,gc; do timeout 90 python3 -m vlprune.kernels.benchmarks.sweep_tmp compile $g > $OUT/c_$g.txt 2>&1 & done
wait
echo "phase 1: $(( $(date +%s) - T0 )) s"
for t in $OUT/test_*.txt; do echo $t; tail -n 3 $t; done
cat $OUT/test_*.txt > $OUT/tests.log; cat $OUT/c_*.txt > $OUT/compile.log; rm $OUT/test_*.txt $OUT/c_*.txt
grep FAIL $OUT/compile.log | head -20
timeout 55 python3 -m vlprune.kernels.benchmarks.sweep_tmp time > $OUT/sweep.log 2>&1
echo "phase 2: $(( $(date +%s) - T0 )) s"
timeout 60 python3 -m vlprune.kernels.benchmarks.run --out $OUT/results.md > $OUT/bench.log 2>&1
echo "phase 3: $(( $(date +%s) - T0 )) s"
tail -n 30 $OUT/bench.log | cut -c1-300
