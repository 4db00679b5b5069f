"""Prints the loss of a micro-batch and the norms of its gradients, on a device.

python -m tests.micro_batch TEACHER STUDENT DEVICE
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

from patching.student_config import read_student_config
from train.batches import collate, to_device
from train.distillation import install_distillation_forward
from train.loss import LossWeights, count

WEIGHTS = LossWeights(cross_entropy=1.0, kl=0.3, cosine=2.0, temperature=2.0)
ROWS = [
    {"input_ids": [*range(5, 21)], "document_lengths": [7, 9]},
    {"input_ids": [*range(40, 56)], "document_lengths": [1, 15]},
]

if __name__ == "__main__":
    teacher_folder, student_folder, device = sys.argv[1:]
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder).to(device)
        for folder in (teacher_folder, student_folder)
    )
    batch = to_device(collate(ROWS), torch.device(device))
    counts = count(batch["labels"])
    layer_map = read_student_config(student_folder).layer_map
    install_distillation_forward(student, teacher, layer_map, WEIGHTS)
    loss = student.train()(**batch, counts=counts).loss
    loss.backward()
    norms = {name: float(each.grad.norm()) for name, each in student.named_parameters()}
    print(json.dumps({"loss": float(loss.detach()), **norms}))
