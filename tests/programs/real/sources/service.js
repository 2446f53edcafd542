// An HTTP server and its clients in one tree: a child over IPC, worker threads, keep-alive connections, timers, files.
//
// service.js ADDRESS: a path (a Unix socket) or a port of 127.0.0.1. Counts go to "counts", what is wrong to "wrong".
'use strict';
const { fork } = require('child_process');
const crypto = require('crypto');
const fs = require('fs');
const http = require('http');
const { Worker, isMainThread, parentPort } = require('worker_threads');

const address = process.argv[2];
const wrong = (text) => fs.appendFileSync('wrong', text + '\n');
const digest = (text) => crypto.createHash('sha256').update(text).digest('hex');

function serve() {
  const worker = new Worker(__filename, { argv: [address] });
  const waiting = new Map();
  worker.on('message', ({ id, answer }) => { waiting.get(id)(answer); waiting.delete(id); });
  let served = 0;
  let connections = 0;
  const server = http.createServer((request, response) => {
    let body = '';
    request.on('data', (part) => { body += part; });
    request.on('end', () => {
      const id = ++served;
      waiting.set(id, (answer) => response.end(JSON.stringify({ answer, connections })));
      worker.postMessage({ id, text: body });
    });
  });
  server.keepAliveTimeout = 600000;
  server.on('connection', () => { connections += 1; });
  server.listen(/^\d+$/.test(address) ? { port: +address, host: '127.0.0.1' } : address, () => {
    const child = fork(__filename, [address, 'client']);
    let last = 0;
    child.on('message', (count) => {
      if (count !== last + 1) wrong(`the client counts ${count} after ${last}`);
      last = count;
      child.send(count);
    });
    child.on('exit', (code, signal) => { if (!process.exitCode) wrong(`the client ended: ${code} ${signal}`); });
    process.on('SIGTERM', () => { process.exitCode = 0; child.removeAllListeners('exit'); child.kill(); process.exit(0); });
  });
  setInterval(() => { global.garbage = Array.from({ length: 5000 }, (_, i) => ({ i })); }, 20);
}

async function be_client() {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 4 });
  const target = /^\d+$/.test(address) ? { port: +address, host: '127.0.0.1' } : { socketPath: address };
  const ask = (text) => new Promise((resolve, reject) => {
    const request = http.request({ ...target, agent, method: 'POST' }, (response) => {
      let body = '';
      response.on('data', (part) => { body += part; });
      response.on('end', () => resolve(JSON.parse(body)));
    });
    request.on('error', reject);
    request.end(text);
  });
  for (let count = 1; ; count += 1) {
    const texts = Array.from({ length: 4 }, (_, i) => `${count} ${i} `.repeat(2000));
    try {
      for (const [i, { answer, connections }] of (await Promise.all(texts.map(ask))).entries()) {
        if (answer !== digest(texts[i])) wrong(`answer ${i} of ${count}`);
        if (connections !== 4 && count > 1) wrong(`${connections} connections at ${count}`);
      }
    } catch (error) {
      wrong(`request ${count}: ${error}`);
    }
    const echoed = new Promise((resolve) => process.once('message', resolve));
    process.send(count);
    if (await echoed !== count) wrong(`echo of ${count}`);
    fs.appendFileSync('counts', `${count}\n`);
  }
}

if (!isMainThread) {
  parentPort.on('message', ({ id, text }) => parentPort.postMessage({ id, answer: digest(text) }));
} else if (process.argv[3] === 'client') {
  be_client();
} else {
  serve();
}
