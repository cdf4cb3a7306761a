#!/usr/bin/env bash
# A Slurm user: shards by a job array, training over two nodes, a time limit, and the model. In a checkout of their own.
#   python -m tests.multinode.slurm_nodes benchmarks/walks/slurm.sh DIRECTORY      on two nodes on this machine
set -euo pipefail
source "$(dirname "$0")/walk.sh"
cp -r "$here/../../launch" "$here/../../ds_configs" .
python3 "$here/make_json_gz.py" raw --files 20 --megabytes 20
state() { scontrol --oneliner show job "$1" | grep -o 'JobState=[A-Z]*' | sort -u | tr '\n' ' '; }
ends() { until [[ $(state "$1") =~ ^(JobState=(COMPLETED|FAILED) )+$ ]]; do sleep 1; done; }
waits() { until [[ $(state "$1") =~ PENDING|COMPLETED|FAILED ]]; do sleep 1; done; }

run sinfo
run codeparrot-ds tokenizer train raw --vocab-size 4096 --max-seq-len 256 -o data/tokenizer
fails 1 sbatch --partition=gpu launch/slurm_preprocess.sbatch raw data/tokenizer data/shards
run sbatch launch/slurm_preprocess.sbatch raw data/tokenizer data/shards
sleep 3
run squeue
run scancel 1
run sbatch --array=0-1 --cpus-per-task=1 launch/slurm_preprocess.sbatch raw data/tokenizer data/shards --valid-fraction 0.02
ends 2
run cat slurm-2_0.out slurm-2_1.out
run codeparrot-ds shards verify data/shards --deep
run codeparrot-ds init mine --recipe quickstart
run sed -i 's/^name: .*/name: mine/; s#shards: .*#shards: data/shards#; s/vocab_size: .*/vocab_size: 4096/; s/ steps: .*/ steps: 100/; s/warmup_steps: .*/warmup_steps: 5/; s/every_steps: 25/every_steps: 10/' mine/recipe.yaml
run sbatch launch/slurm_train.sbatch mine/recipe.yaml
ends 4
run cat slurm-4.out
run sbatch --time=7 launch/slurm_train.sbatch mine/recipe.yaml --ranks 1
until scontrol --oneliner show job 5 | grep -qE 'Restarts=1|JobState=COMPLETED'; do sleep 1; done
run squeue
run codeparrot-ds status runs/mine
for _ in $(seq 60); do
    if grep -q '"finished"' runs/mine/status.json; then break; fi
    waits 5 # for Slurm, which lets a job that was put back into the queue rest for two minutes
    scontrol update JobId=5 StartTime=now || true
    sleep 5
done
run cat slurm-5.out
run codeparrot-ds status runs/mine
run srun --nodes=1 --ntasks=1 codeparrot-ds convert runs/mine runs/mine/hf
run codeparrot-ds complete runs/mine --num 1 'def main():'
