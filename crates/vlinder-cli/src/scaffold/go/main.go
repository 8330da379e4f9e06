// @NAME@: an agent of Vlinder. Go's standard library only.
//
// An agent is an HTTP server: GET /health answers 200, POST /invoke answers one turn. What it must
// remember goes through the node, never into a variable: it may be killed and replaced at any time.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"strings"
)

// Where the node answers a process; a container finds it under names such as sqlite-kv.vlinder.local.
var bridge = os.Getenv("VLINDER_BRIDGE_URL")

type message struct {
	Role    string `json:"role"` // user | agent
	Content string `json:"content"`
}

type turn struct {
	Input      string    `json:"input"`
	History    []message `json:"history"`
	Session    string    `json:"session"`
	Branch     string    `json:"branch"`
	Submission string    `json:"submission"`
}

// call asks the node: call("sqlite-kv/get", …); so do sqlite-kv/put, /list and /delete.
type call func(what string, body any) (string, error)

// answer is the reply to one turn. Put your agent here.
func answer(turn turn, call call) (string, error) {
	known, err := call("sqlite-kv/get", map[string]string{"path": "count"})
	if err != nil {
		return "", err
	}
	count, _ := strconv.Atoi(known)
	count++
	_, err = call("sqlite-kv/put", map[string]string{"path": "count", "content": strconv.Itoa(count)})
	if err != nil {
		return "", err
	}
	before := ""
	for _, said := range turn.History {
		if said.Role == "user" {
			before = " Before that you said: " + said.Content
		}
	}
	return fmt.Sprintf("You said: %s (number %d in this session).%s", turn.Input, count, before), nil
}

func caller(invocation string) call {
	return func(what string, body any) (string, error) {
		encoded, err := json.Marshal(body)
		if err != nil {
			return "", err
		}
		service, path, _ := strings.Cut(what, "/")
		url := bridge + "/" + what
		if bridge == "" {
			url = "http://" + service + ".vlinder.local:3544/" + path
		}
		request, err := http.NewRequest("POST", url, bytes.NewReader(encoded))
		if err != nil {
			return "", err
		}
		request.Header.Set("Content-Type", "application/json")
		request.Header.Set("X-Vlinder-Invocation", invocation)
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return "", err
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if err != nil {
			return "", err
		}
		if response.StatusCode != http.StatusOK {
			return "", fmt.Errorf("%s answered %d: %.500s", what, response.StatusCode, text)
		}
		return string(text), nil
	}
}

func invoke(w http.ResponseWriter, r *http.Request) {
	var asked turn
	err := json.NewDecoder(r.Body).Decode(&asked)
	reply := ""
	if err == nil {
		reply, err = answer(asked, caller(r.Header.Get("X-Vlinder-Invocation")))
	}
	if err != nil {
		// Any other status than 200 fails the turn, with this text on record.
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	io.WriteString(w, reply)
}

func main() {
	http.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Vlinder-Input", "json") // we want the conversation as JSON
		io.WriteString(w, "ok")
	})
	http.HandleFunc("POST /invoke", invoke)
	host, port := "127.0.0.1", os.Getenv("PORT")
	if bridge == "" {
		host = "" // in a container the node comes from outside
	}
	if port == "" {
		port = "8080"
	}
	log.Fatal(http.ListenAndServe(host+":"+port, nil))
}
