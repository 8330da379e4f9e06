// @NAME@: an agent of Vlinder. Node.js alone, no packages.
//
// An agent is an HTTP server: GET /health answers 200, POST /invoke answers one turn. What it must
// remember goes through the node, never into a variable: it may be killed and replaced at any time.

import {createServer} from "node:http";

// Where the node answers a process; a container finds it under names such as sqlite-kv.vlinder.local.
const BRIDGE = process.env.VLINDER_BRIDGE_URL;
/**
 * The reply to one turn. Put your agent here.
 *
 * turn: {input, history: [{role: "user" | "agent", content}], session, branch, submission}
 * call: await call("sqlite-kv/get", {path}) asks the node; so do sqlite-kv/put, /list and /delete.
 */
async function answer(turn, call) {
  const count = Number(await call("sqlite-kv/get", {path: "count"})) + 1;
  await call("sqlite-kv/put", {path: "count", content: String(count)});
  const said = turn.history.filter((message) => message.role === "user").map((message) => message.content);
  const before = said.length ? ` Before that you said: ${said[said.length - 1]}` : "";
  return `You said: ${turn.input} (number ${count} in this session).${before}`;
}

function caller(invocation) {
  return async (what, body) => {
    const cut = what.indexOf("/");
    const far = `http://${what.slice(0, cut)}.vlinder.local:3544${what.slice(cut)}`;
    const headers = {"Content-Type": "application/json", "X-Vlinder-Invocation": invocation};
    const response = await fetch(BRIDGE ? `${BRIDGE}/${what}` : far, {method: "POST", headers, body: JSON.stringify(body)});
    const text = await response.text();
    if (!response.ok) throw new Error(`${what} answered ${response.status}: ${text.slice(0, 500)}`);
    return text;
  };
}

const server = createServer(async (request, response) => {
  const reply = (status, text) => {
    // On /health: we want the conversation as JSON.
    response.writeHead(status, {"Content-Type": "text/plain; charset=utf-8", "Vlinder-Input": "json"});
    response.end(text);
  };
  try {
    if (request.method === "GET") return reply(request.url === "/health" ? 200 : 404, "ok");
    let body = "";
    request.setEncoding("utf8");
    for await (const piece of request) body += piece;
    if (request.url !== "/invoke") return reply(404, "not here");
    const invocation = String(request.headers["x-vlinder-invocation"] ?? "");
    reply(200, await answer(JSON.parse(body), caller(invocation)));
  } catch (error) {
    // Any other status than 200 fails the turn, with this text on record.
    reply(500, String(error));
  }
});
server.listen(Number(process.env.PORT ?? 8080), BRIDGE ? "127.0.0.1" : "0.0.0.0");
