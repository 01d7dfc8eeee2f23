"""Your model, your data loader, your loop, and a law sheet."""

import torch
from torch.utils.data import DataLoader

import thermograd as tg

model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10))
loader = DataLoader(tg.data.digits(), batch_size=100, shuffle=True)
loss = torch.nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

problem = tg.Problem(model, loss, loader)
with tg.Recorder("runs/mine", problem, optimizer, overwrite=True):
    for _ in range(200):
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()

sheet = tg.check("runs/mine", problem)
print(sheet)
sheet.to_html("runs/mine/report.html")
